"""Images that are drawn, not downloaded: dSprites, the offline benchmark's tasks, what a backbone is pretrained on.

Every image is decided by numbers alone (the task, the split and the index), in whatever order images are asked for.
"""

__all__: list[str] = []
