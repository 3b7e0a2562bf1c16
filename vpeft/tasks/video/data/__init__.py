"""Videos: lists, exact decoding, sampling of frames, transforms of clips."""

from .build import build_clips, check_video_source, find_videos, open_files
from .clips import ClipOptions, Clips

__all__ = ["ClipOptions", "Clips", "build_clips", "check_video_source", "find_videos", "open_files"]
