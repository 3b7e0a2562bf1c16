"""Where vpeft meets other libraries, one package for each."""

__all__: list[str] = []
