"""Tasks: loss and metrics."""

from .base import Task
from .classification import Classification
from .video_task import VideoClassification

__all__ = ["Classification", "Task", "VideoClassification"]
