"""One YAML per experiment, typed: unknown keys, wrong types and impossible values are refused with the key's path."""

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import ConfigError, did_you_mean
from ..tasks.registry import KINDS, task_class
from ..tasks.video.data.sampling import SAMPLINGS


@dataclass
class ModelConfig:
    """The timm backbone. ``checkpoint`` is a local weight file that replaces timm's pretrained weights.

    The classifier starts afresh, even where its class count equals that of the weights, unless ``keep_head`` is set.
    """

    name: str = "vit_micro_patch4_28.vpeft_fashion"
    pretrained: bool = True
    checkpoint: str | None = None
    keep_head: bool = False
    img_size: int | None = None
    drop_path: float = 0.0
    drop: float = 0.0
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class MethodConfig:
    """A registered method and its hyper-parameters (see ``vpeft methods``)."""

    name: str = "adaptformer"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataConfig:
    """Where images come from; mean, std, interpolation and size are the model's own unless set here."""

    source: str = "digits"
    root: str | None = None
    train_split: str = "train"
    val_split: str | None = None
    val_size: int = 0
    test_split: str | None = "test"
    num_classes: int | None = None
    classes: list[str] | None = None
    num_samples: int | None = None
    download: bool = False
    batch_size: int = 256
    workers: int = 0
    mean: list[float] | None = None
    std: list[float] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None


@dataclass
class AugmentConfig:
    """timm's training augmentation; off by default, as in VTAB-1k's protocol.

    Images are cut to a random ``scale`` (share of the area) and ``ratio`` and resized; or, with ``scale_jitter``, resized
    so that the short side is a random multiple of the input's, within these bounds, and cut at a random place.
    """

    enabled: bool = False
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    ratio: list[float] = field(default_factory=lambda: [0.75, 1.3333])
    scale_jitter: list[float] | None = None
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0
    auto_augment: str | None = None
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0


@dataclass
class OptimConfig:
    """timm's optimiser by name. Biases, norms and what a method exempts are never decayed."""

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    momentum: float = 0.9
    head_lr: float | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class ScheduleConfig:
    """timm's learning-rate schedule, stepped at every update; lengths in epochs. ``power`` is that of ``poly``."""

    name: str = "cosine"
    warmup_epochs: int = 0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    cooldown_epochs: int = 0
    power: float = 1.0


@dataclass
class TrainConfig:
    """``batch_size`` is what one optimiser step sees, over all processes and accumulated parts."""

    epochs: int = 20
    batch_size: int = 64
    accumulate: int = 1
    drop_last: bool = False
    clip_grad: float | None = None
    label_smoothing: float = 0.0
    ema: float | None = None
    precision: str = "fp32"
    compile: bool = False
    fused_attention: bool = True
    grad_checkpointing: bool = False
    select: str = "best"
    deterministic: bool = True


@dataclass
class CacheConfig:
    """Frozen features below the first trained site, computed once and replayed in every epoch.

    ``mode``: ``off``; ``memory``; ``disk`` (memory-mapped files in ``folder``, found again by a later run); or ``auto``:
    where it is possible, in memory within ``budget_gb``, else on disk.
    """

    mode: str = "off"
    dtype: str = "fp32"
    budget_gb: float = 4.0
    folder: str | None = None


@dataclass
class WandbConfig:
    """Weights & Biases tracking; off unless asked for."""

    mode: str = "disabled"
    project: str = "vpeft"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class ScenesConfig:
    """How many composed scenes (``data.source: scenes``) there are in each split; ``size`` is the crop where None."""

    train: int = 400
    val: int = 100
    test: int = 200
    size: int | None = None
    seed: int = 0


@dataclass
class SegConfig:
    """Segmentation (``task: segmentation``): the decode head on the backbone's feature maps, and how images are taken.

    ``head``: one of mmsegmentation's by its short name (fcn, psp, upernet, setr_pup, setr_mla, segmenter, segformer, dpt)
    with its own keywords in ``options``, or ``san``. ``out_indices``: blocks or stages; by default the last, or four that
    divide the depth evenly where the head reads several. ``aux``: maps that get an auxiliary FCN head. ``losses``: of ce,
    dice and focal, with weights. ``mode``: whole images brought to ``crop``, or windows of it every ``stride`` pixels
    (two thirds of the crop where None). ``short``: test images' shorter side; ``augment`` and what follows is for training.
    """

    head: str = "fcn"
    options: dict[str, Any] = field(default_factory=dict)
    out_indices: list[int] | None = None
    pyramid: str | None = None
    norm: str | None = None
    aux: list[int] = field(default_factory=list)
    aux_weight: float = 0.4
    losses: dict[str, float] = field(default_factory=lambda: {"ce": 1.0})
    mode: str = "whole"
    crop: int | None = None
    stride: int | None = None
    short: int | None = None
    augment: bool = False
    scale: list[float] = field(default_factory=lambda: [0.5, 2.0])
    cat_max_ratio: float = 0.75
    hflip: float = 0.5
    photometric: bool = True
    overlays: int = 4
    scenes: ScenesConfig = field(default_factory=ScenesConfig)


@dataclass
class MotionConfig:
    """The generated motion clips (``data.source: motion``), written into ``data.root`` where they are not there yet.

    Numbers of clips, canvas and garment's speed in pixels (per frame), rotation in degrees per frame.
    """

    train: int = 1000
    test: int = 500
    size: int = 28
    frames: int = 16
    speed: int = 2
    turn: float = 30.0
    seed: int = 0


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

    mode: str = "framewise"
    frames: int = 8
    stride: int = 1
    sampling: str = "uniform"
    tubelet: int = 2
    pool: str = "after"
    dropout: float = 0.0
    views: int = 1
    crops: int = 1
    short_side: int | None = None
    flip: bool = False
    skip_broken: bool = False
    min_frames: int = 1
    template: str | None = None
    lists: str | None = None
    fold: int = 1
    cache: str | None = None
    strips: int = 8
    motion: MotionConfig = field(default_factory=MotionConfig)


@dataclass
class Config:
    """A whole experiment."""

    name: str = "run"
    output: str = "runs"
    task: str = "classification"
    seed: int = 0
    resume: str = "auto"
    overwrite: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    seg: SegConfig = field(default_factory=SegConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


CHOICES = {
    "task": KINDS,
    "resume": ("auto", "never"),
    "train.precision": ("fp32", "bf16", "fp16"),
    "train.select": ("best", "last"),
    "cache.mode": ("off", "auto", "memory", "disk"),
    "cache.dtype": ("fp32", "bf16", "fp16"),
    "wandb.mode": ("disabled", "offline", "online"),
    "data.crop_mode": ("center", "squash", "border"),
    "data.interpolation": ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"),
    "video.mode": ("framewise", "joint"),
    "video.sampling": SAMPLINGS,
    "video.pool": ("after", "before"),
    "seg.mode": ("whole", "slide"),
    "seg.pyramid": ("beit", "feature2pyramid"),
    "seg.norm": ("final", "layer"),
    "schedule.name": ("cosine", "tanh", "step", "multistep", "poly", "constant"),
}
# (lowest, highest) allowed value; None is open.
RANGES = {
    "seed": (0, None),
    "model.drop_path": (0, 0.99),
    "model.drop": (0, 0.99),
    "model.img_size": (1, None),
    "data.val_size": (0, None),
    "data.num_classes": (1, None),
    "data.batch_size": (1, None),
    "data.workers": (0, None),
    "data.crop_pct": (0.01, 1),
    "augment.hflip": (0, 1),
    "augment.vflip": (0, 1),
    "augment.random_erasing": (0, 1),
    "augment.mixup": (0, None),
    "augment.cutmix": (0, None),
    "optim.lr": (0, None),
    "optim.head_lr": (0, None),
    "optim.weight_decay": (0, None),
    "optim.momentum": (0, 1),
    "schedule.warmup_epochs": (0, None),
    "schedule.cooldown_epochs": (0, None),
    "schedule.min_lr": (0, None),
    "schedule.warmup_lr": (0, None),
    "schedule.power": (0, None),
    "train.epochs": (1, None),
    "train.batch_size": (1, None),
    "train.accumulate": (1, None),
    "train.clip_grad": (0, None),
    "train.label_smoothing": (0, 0.99),
    "train.ema": (0, 0.999999),
    "cache.budget_gb": (0, None),
    "seg.aux_weight": (0, None),
    "seg.crop": (1, None),
    "seg.stride": (1, None),
    "seg.short": (1, None),
    "seg.cat_max_ratio": (0.01, 1),
    "seg.hflip": (0, 1),
    "seg.overlays": (0, None),
    "seg.scenes.train": (1, None),
    "seg.scenes.val": (0, None),
    "seg.scenes.test": (0, None),
    "seg.scenes.size": (16, None),
    "seg.scenes.seed": (0, None),
    "video.frames": (1, None),
    "video.stride": (1, None),
    "video.tubelet": (1, None),
    "video.dropout": (0, 0.99),
    "video.views": (1, None),
    "video.strips": (0, None),
    "video.crops": (1, None),
    "video.short_side": (1, None),
    "video.min_frames": (1, None),
    "video.fold": (1, 3),
    "video.motion.train": (1, None),
    "video.motion.test": (1, None),
    "video.motion.size": (14, None),
    "video.motion.frames": (1, None),
    "video.motion.seed": (0, None),
}


def load_config(file: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> DictConfig:
    """Read a YAML file with its bases and ``key.sub=value`` overrides into a checked, typed configuration.

    Raises:
        ConfigError: with the key's path, what was found, and the nearest valid name or value.
    """
    config = read_config(Config, file, overrides)
    check(config)
    return config


def read_config(schema: type, file: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """A YAML file with its bases and overrides, laid over the defaults of a dataclass; only keys and types are checked.

    Raises:
        ConfigError: as ``load_config``.
    """
    layers = _read(Path(file), ())
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"override '{item}': expected key.sub=value")
        try:
            layers.append(OmegaConf.from_dotlist([item]))
        except Exception as error:  # yaml's own errors have several unrelated classes
            raise ConfigError(f"override '{item}': {error}") from error
    config = OmegaConf.structured(schema)
    for layer in layers:
        config = merge(config, layer)
    return config


def from_container(values: dict) -> DictConfig:
    """A configuration from plain values, such as those stored inside a checkpoint."""
    config = merge(OmegaConf.structured(Config), OmegaConf.create(values))
    check(config)
    return config


def merge(config: DictConfig, layer: DictConfig) -> DictConfig:
    """Lay untyped values over a typed configuration."""
    _check_keys(OmegaConf.get_type(config), layer, "")
    try:
        return OmegaConf.merge(config, layer)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from error


def _read(file: Path, seen: tuple[Path, ...]) -> list[DictConfig]:
    """The file's bases, then the file."""
    if not file.is_file():
        near = [str(p) for p in file.parent.glob("*.yaml")] if file.parent.is_dir() else []
        raise ConfigError(f"configuration {file} does not exist{did_you_mean(str(file), near)}")
    file = file.resolve()
    if file in seen:
        raise ConfigError(f"{file}: its bases lead back to itself")
    try:
        layer = OmegaConf.load(file)
    except Exception as error:
        raise ConfigError(f"{file} is not readable YAML: {error}") from error
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"{file}: expected a mapping of keys")
    bases = layer.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    return [x for b in bases for x in _read(file.parent / b, (*seen, file))] + [layer]


def _check_keys(schema: type, values: Any, path: str) -> None:
    if not OmegaConf.is_dict(values):
        raise ConfigError(f"{path or 'configuration'}: expected a mapping of keys, got {values!r}")
    known = {f.name: f for f in fields(schema)}
    for key in values:
        where = f"{path}.{key}" if path else str(key)
        if key not in known:
            raise ConfigError(f"{where}: unknown key{did_you_mean(key, known)}")
        kind, value = known[key].type, values[key]
        if is_dataclass(kind) and value is not None:
            _check_keys(kind, value, where)
        elif typing.get_origin(kind) is list and is_dataclass(typing.get_args(kind)[0]) and OmegaConf.is_list(value):
            for number, item in enumerate(value):
                _check_keys(typing.get_args(kind)[0], item, f"{where}[{number}]")


def check_values(
    config: DictConfig, choices: Mapping[str, Sequence[str]], ranges: Mapping[str, tuple[float | None, float | None]]
) -> None:
    """Refuse a key's value that is none of its choices, or out of its range.

    Raises:
        ConfigError: with the key's path and what it may be.
    """
    for key, allowed in choices.items():
        value = OmegaConf.select(config, key)
        if value is not None and value not in allowed:
            raise ConfigError(f"{key}: '{value}' is not one of {', '.join(allowed)}{did_you_mean(value, allowed)}")
    for key, (low, high) in ranges.items():
        value = OmegaConf.select(config, key)
        if value is not None and ((low is not None and value < low) or (high is not None and value > high)):
            bound = f"at least {low}" + (f" and at most {high}" if high is not None else "")
            raise ConfigError(f"{key}: {value} is impossible; it must be {bound}")


def check(config: DictConfig) -> None:
    """Refuse impossible values that types alone let through."""
    if config.cache.mode == "False":  # YAML reads a bare off as no
        config.cache.mode = "off"
    check_values(config, CHOICES, RANGES)
    for key in ("augment.scale", "augment.ratio", "augment.scale_jitter", "seg.scale"):
        pair = OmegaConf.select(config, key)
        if pair is not None and (len(pair) != 2 or not 0 < pair[0] <= pair[1]):
            raise ConfigError(f"{key}: expected two numbers 0 < low <= high, got {list(pair)}")
    if config.schedule.warmup_epochs >= config.train.epochs and config.schedule.warmup_epochs:
        raise ConfigError(
            f"schedule.warmup_epochs: {config.schedule.warmup_epochs} must be below train.epochs {config.train.epochs}"
        )
    if config.train.accumulate > config.train.batch_size:
        raise ConfigError("train.accumulate: cannot cut a batch into more parts than it has samples")
    reason = why_no_cache(config) if config.cache.mode in ("memory", "disk") else None
    if reason:
        raise ConfigError(f"cache.mode: {reason}, or cache.mode=off")
    if (config.augment.mixup or config.augment.cutmix) and not config.augment.enabled:
        raise ConfigError("augment.enabled: mixup and cutmix need augmentation to be on")


def why_no_cache(config: DictConfig) -> str | None:
    """Why features cannot be the same in every epoch of this experiment, and what to set instead; or None."""
    reason = task_class(config.task).no_cache
    if reason:
        return reason
    if config.model.drop_path or config.model.drop:
        return (
            "drop path and dropout in frozen blocks draw anew at every step, which stored features cannot; "
            "choose model.drop_path=0 and model.drop=0"
        )
    if config.augment.enabled:
        return "augmentation gives other images in every epoch, so nothing can be stored; choose augment.enabled=false"
    if config.train.compile:
        return "a compiled model cannot leave modules out; choose train.compile=false"
    return None
