"""Where vpeft meets what surrounds a model: feature caches, other libraries, hubs."""

__all__: list[str] = []
