"""Where vpeft meets other libraries, one package for each."""
