"""Videos: lists, exact decoding, sampling of frames, transforms of clips."""

from .build import build_clips, check_video_source, find_videos, open_files
from .clips import ClipOptions, Clips
from .decode import spread_frames

__all__ = ["ClipOptions", "Clips", "build_clips", "check_video_source", "find_videos", "open_files", "spread_frames"]
