"""Where vpeft meets what surrounds a model: feature caches, other libraries, hubs."""
