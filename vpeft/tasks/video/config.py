"""Keys of videos in an experiment's configuration; nothing else, so that reading one stays quick."""

from dataclasses import dataclass, field

from ...options import SEED, SIZE, option, probability

SAMPLINGS = ("uniform", "dense", "videomae")


@dataclass
class MotionConfig:
    """The generated motion clips (``data.source: motion``), written into ``data.root`` where they are not there yet.

    Numbers of clips, canvas and garment's speed in pixels (per frame), rotation in degrees per frame.
    """

    train: int = option(1000, ge=1, unit="clips")
    test: int = option(500, ge=1, unit="clips")
    size: int = option(28, ge=14, le=4096, unit="pixels")
    frames: int = option(16, ge=1, le=SIZE, unit="frames")
    speed: int = option(2, ge=-SIZE, le=SIZE, unit="pixels per frame")
    turn: float = option(30.0, unit="degrees per frame", ge=-360, le=360)
    seed: int = option(0, ge=0, le=SEED)


@dataclass
class VideoConfig:
    """Clips of ``task: video``: how they are cut from videos, and how the backbone sees them.

    ``mode``: ``framewise`` (each frame through the image backbone, features averaged over time) or ``joint`` (tokens of
    space and time together; each spans ``tubelet`` frames). Frame by frame, ``pool`` takes the mean over time ``after``
    or ``before`` the final norm, with ``dropout`` in front of the classifier.
    ``sampling``: ``uniform`` (a frame from each of ``frames`` equal segments), ``dense`` or ``videomae`` (every
    ``stride``-th frame). A video is judged by the mean over ``views`` (in time) x ``crops`` (along the long side).
    ``lists`` is the folder of the list files where they are not in ``data.root``; ``fold`` is HMDB51's split;
    ``template`` names the frames where videos are folders of pictures; ``cache`` is a folder for frame counts where the
    one of the lists cannot be written. ``flip`` allows mirrored clips (``augment.hflip``). ``strips`` is how many test
    clips the run's picture shows.
    """

    mode: str = option("framewise", choices=("framewise", "joint"))
    frames: int = option(8, ge=1, le=SIZE, unit="frames")
    stride: int = option(1, ge=1, le=SIZE, unit="frames")
    sampling: str = option("uniform", choices=SAMPLINGS)
    tubelet: int = option(2, ge=1, le=SIZE, unit="frames")
    pool: str = option("after", choices=("after", "before"))
    dropout: float = probability(0.0)
    views: int = option(1, ge=1, le=1000, unit="clips")
    crops: int = option(1, ge=1, le=1000, unit="crops")
    short_side: int | None = option(None, ge=1, le=SIZE, unit="pixels", help="to which frames are resized")
    flip: bool = False
    skip_broken: bool = option(False, help="the former name of `data.skip_broken`")
    min_frames: int = option(1, ge=1, unit="frames", help="shorter videos are broken ones")
    template: str | None = option(None, free="a file name such as `img_{:05d}.jpg`")
    lists: str | None = option(None, free="a folder's path")
    fold: int = option(1, ge=1, le=3)
    cache: str | None = option(None, free="a folder's path")
    strips: int = option(8, ge=0, le=1000, unit="clips")
    motion: MotionConfig = field(default_factory=MotionConfig)
