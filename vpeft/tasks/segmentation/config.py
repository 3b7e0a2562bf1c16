"""Keys of segmentation in an experiment's configuration; nothing else, so that reading one stays quick."""

from dataclasses import dataclass, field
from typing import Any

from ...options import SEED, SIZE, nonnegative, option


@dataclass
class ScenesConfig:
    """How many composed scenes (``data.source: scenes``) there are in each split, and how they are composed.

    ``size`` is the crop where None. ``fresh``: every epoch trains on new scenes, which seed, epoch and index decide.
    ``objects``: fewest and most garments of a scene. ``scales``: smallest and largest factor on a garment's 28x28 pixels.
    ``occlusion``: garments may cover each other; else one that finds no free place is left out.
    ``jitter``: garments stand side by side, at most one in each square of 28 pixels, so far from its middle at most;
    anywhere where None.
    """

    train: int = option(400, ge=1, unit="scenes")
    val: int = option(100, ge=0, unit="scenes")
    test: int = option(200, ge=0, unit="scenes")
    size: int | None = option(None, ge=16, le=SIZE, unit="pixels")
    seed: int = option(0, ge=0, le=SEED)
    fresh: bool = option(False, help="every epoch trains on new scenes")
    objects: list[int] = option([2, 5], ge=0, le=1000, length=2, unit="garments")
    scales: list[float] = option([0.7, 1.3], ge=0.25, le=1000, length=2, help="of a garment of 28x28 pixels")
    occlusion: bool = option(True, help="garments may cover each other")
    jitter: int | None = option(None, ge=0, le=SIZE, unit="pixels")


@dataclass
class SegConfig:
    """Segmentation (``task: segmentation``): the decode head on the backbone's feature maps, and how images are taken.

    ``head``: one of mmsegmentation's by its short name (fcn, psp, upernet, setr_pup, setr_mla, segmenter, segformer, dpt)
    with its own keywords in ``options``, or ``san``. ``out_indices``: blocks or stages; by default the last, or four that
    divide the depth evenly where the head reads several. ``aux``: maps that get an auxiliary FCN head. ``losses``: of ce,
    dice and focal, with weights. ``mode``: whole images brought to ``crop``, or windows of it every ``stride`` pixels
    (two thirds of the crop where None). ``short``: test images' shorter side; ``augment`` and what follows is for training.
    """

    head: str = option("fcn", free="a decode head's short name, or `san`")
    options: dict[str, Any] = option({}, free="the head's own keywords")
    out_indices: list[int] | None = option(None, ge=-1000, le=1000, length=(1, 1000), unit="(block or stage)")
    pyramid: str | None = option(None, choices=("beit", "feature2pyramid"), help="maps of several sizes from a plain ViT")
    norm: str | None = option(None, choices=("final", "layer"), help="of the maps")
    aux: list[int] = option([], ge=-1000, le=1000, length=(0, 1000), unit="(map)")
    aux_weight: float = nonnegative(0.4)
    losses: dict[str, float] = option({"ce": 1.0}, ge=0, free="weights of `ce`, `dice` and `focal`")
    mode: str = option("whole", choices=("whole", "slide"))
    crop: int | None = option(None, ge=1, le=SIZE, unit="pixels")
    stride: int | None = option(None, ge=1, le=SIZE, unit="pixels")
    short: int | None = option(None, ge=1, le=SIZE, unit="pixels")
    augment: bool = option(False, help="all that is for training")
    scale: list[float] = option([0.5, 2.0], gt=0, length=2, help="of the short side, in training")
    cat_max_ratio: float = option(0.75, ge=0.01, le=1, help="largest share of one class in a crop")
    crop_step: int = option(1, ge=1, le=SIZE, unit="pixels", help="random crops begin at its multiples")
    hflip: float = option(0.5, ge=0, le=1, unit="probability", help="probability of a mirror image")
    photometric: bool = option(True, help="random colours")
    overlays: int = option(4, ge=0, le=1000, unit="images", help="in the run's picture")
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
