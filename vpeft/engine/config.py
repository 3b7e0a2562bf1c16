"""One YAML per experiment, typed: unknown keys, wrong types and impossible values are refused with the key's path."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..data.embedded import FASHION_ROOT
from ..data.presets import PRESETS
from ..errors import ConfigError
from ..options import LARGEST, SEED, SIZE, check_values, nonnegative, option, probability
from ..tasks.registry import TASKS, task_class
from ..tasks.segmentation.config import ScenesConfig, SegConfig
from ..tasks.video.config import MotionConfig, VideoConfig
from .layers import merge, read_config
from .solvers.config import SOLVERS, SolveConfig

PRECISIONS = ("fp32", "bf16", "fp16")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")

__all__ = [
    "PRECISIONS", "AugmentConfig", "CacheConfig", "Config", "DataConfig", "MethodConfig", "ModelConfig", "MotionConfig",
    "OptimConfig", "ScenesConfig", "ScheduleConfig", "SegConfig", "SolveConfig", "TrainConfig", "VideoConfig", "WandbConfig",
    "check", "check_options", "from_container", "load_config", "merge", "read_config", "resolved", "why_no_cache",
]  # fmt: skip


@dataclass
class ModelConfig:
    """The timm backbone. ``checkpoint`` is a local weight file that replaces timm's pretrained weights.

    The classifier starts afresh, even where its class count equals that of the weights, unless ``keep_head`` is set.
    """

    name: str = option("vit_micro_patch4_28.vpeft_fashion", free="a timm model, with the tag of its weights")
    pretrained: bool = option(True, help="with the weights of the name")
    checkpoint: str | None = option(None, free="a file's path", help="weights in place of timm's")
    keep_head: bool = option(False, help="the classifier of the weights")
    img_size: int | None = option(None, ge=1, le=SIZE, unit="pixels", help="the model's own where none")
    drop_path: float = probability(0.0, help="stochastic depth in the backbone")
    drop: float = probability(0.0, help="dropout in the backbone")
    kwargs: dict[str, Any] = option({}, free="further keywords of timm's factory")


@dataclass
class MethodConfig:
    """A registered method and its hyper-parameters (see ``vpeft methods``)."""

    name: str = option("adaptformer", free="a registered method")
    options: dict[str, Any] = option({}, free="the method's options, see docs/methods.md")


@dataclass
class DataConfig:
    """Where images come from; mean, std, interpolation and size are the model's own unless set here."""

    source: str = option("digits", free="a data set's name, or `folder`")
    root: str | None = option(None, free="a folder's path", help="of the data")
    fashion_mnist: str | None = option(
        None, free="a folder's path", help="with the four files of Fashion-MNIST; generated sets take the excerpt that ships"
    )
    train_split: str = option("train", free="a split's name")
    val_split: str | None = option(None, free="a split's name")
    shots: int | None = option(None, ge=1, le=16, unit="images", help="of each class, of the lists of few-shot benchmarks")
    list_seed: int = option(0, ge=0, le=2, help="which of the lists of shots; not the seed of the run")
    image_root: str | None = option(None, free="a folder's path", help="of a benchmark's images, where not beside its lists")
    also_test: list[str] = option(
        [], length=(0, 20), free="a benchmark's set", help="tested too, once, with the same classes"
    )
    val_size: int = option(0, ge=0, le=10**9, unit="samples", help="of the training split, where there is no `val_split`")
    test_split: str | None = option("test", free="a split's name")
    num_classes: int | None = option(None, ge=1, unit="classes", help="to be checked against the data")
    classes: list[str] | None = option(
        None, length=(1, LARGEST), free="a class's name", help="in the order of the labels; names where the data have none"
    )
    num_samples: int | None = option(
        None, ge=1, le=10**12, unit="samples", help="of each split that are used, evenly from all; a stream's length"
    )
    download: bool = option(False, help="where the data set allows it")
    skip_broken: bool = option(False, help="leave out and count what cannot be read; else it ends the run")
    batch_size: int = option(256, ge=1, unit="samples", help="outside training")
    workers: int = option(0, ge=0, le=1024, unit="processes", help="that load data; 0 loads in the main one")
    preset: str | None = option(None, choices=tuple(PRESETS), help="resizing and normalisation; the keys below change parts")
    mean: list[float] | None = option(None, length=(1, 1000), help="of each channel")
    std: list[float] | None = option(None, ge=1e-6, length=(1, 1000), help="of each channel")
    interpolation: str | None = option(None, choices=INTERPOLATIONS, help="with which images are resized")
    crop_pct: float | None = option(None, ge=0.01, le=1, help="share of the resized image that tests see")
    crop_mode: str | None = option(None, choices=("center", "squash", "border"), help="of test images")


@dataclass
class AugmentConfig:
    """timm's training augmentation; off by default, as in VTAB-1k's protocol.

    Images are cut to a random ``scale`` (share of the area) and ``ratio`` and resized; or, with ``scale_jitter``, resized
    so that the short side is a random multiple of the input's, within these bounds, and cut at a random place.
    """

    enabled: bool = option(False, help="all that follows")
    scale: list[float] = option([0.08, 1.0], gt=0, length=2, help="share of the area")
    ratio: list[float] = option([0.75, 1.3333], gt=0, length=2, help="width over height")
    scale_jitter: list[float] | None = option(None, gt=0, length=2, help="multiple of the input's side")
    hflip: float = option(0.5, ge=0, le=1, unit="probability", help="probability of a mirror image")
    vflip: float = option(0.0, ge=0, le=1, unit="probability", help="probability of an image upside down")
    color_jitter: float = nonnegative(0.0, help="strength")
    auto_augment: str | None = option(None, free="a policy of timm, such as `rand-m9-mstd0.5`")
    random_erasing: float = option(0.0, ge=0, le=1, unit="probability", help="probability")
    mixup: float = nonnegative(0.0, help="alpha of the beta distribution; 0 is off")
    cutmix: float = nonnegative(0.0, help="alpha of the beta distribution; 0 is off")


@dataclass
class OptimConfig:
    """timm's optimiser by name. Biases, norms and what a method exempts are never decayed."""

    name: str = option("adamw", free="an optimiser of timm")
    lr: float = nonnegative(1e-3, help="of the method")
    weight_decay: float = nonnegative(1e-4, help="of what is decayed")
    momentum: float = option(0.9, ge=0, le=1, help="of SGD and its kin")
    head_lr: float | None = nonnegative(None, help="`lr` where None")
    layer_decay: float = option(1.0, gt=0, le=1, help="factor of the rate from each layer of the model to the one below")
    lr_scales: dict[str, float] = option({}, ge=0, le=1000, free="factors of the rate, by paths of the model's modules")
    kwargs: dict[str, Any] = option({}, free="further keywords of timm's factory")


@dataclass
class ScheduleConfig:
    """timm's learning-rate schedule, stepped at every update; lengths in epochs. ``power`` is that of ``poly``."""

    name: str = option("cosine", choices=("cosine", "tanh", "step", "multistep", "poly", "constant"))
    warmup_epochs: int = option(0, ge=0, unit="epochs", help="in which the rate rises")
    warmup_lr: float = nonnegative(1e-6, help="where the rise starts")
    min_lr: float = nonnegative(1e-5, help="where the fall ends")
    cooldown_epochs: int = option(0, ge=0, unit="epochs", help="at the end, with the lowest rate")
    power: float = nonnegative(1.0, help="of `poly`")


@dataclass
class TrainConfig:
    """``batch_size`` is what one optimiser step sees, over all processes and accumulated parts."""

    epochs: int = option(20, ge=1, unit="epochs")
    batch_size: int = option(64, ge=1, unit="samples")
    accumulate: int = option(1, ge=1, unit="parts", help="that a batch is cut into")
    drop_last: bool = option(False, help="leave out an incomplete last batch")
    clip_grad: float | None = nonnegative(None, help="largest norm of the gradient")
    label_smoothing: float = option(0.0, ge=0, lt=1, help="share that all classes get")
    ema: float | None = option(None, ge=0, lt=1, help="decay of a moving average of the weights")
    precision: str = option("fp32", choices=PRECISIONS, help="of forward and backward")
    solver: str = option("optim", choices=SOLVERS, help="what trains; the others find a head on frozen features at once")
    compile: bool = option(False, help="with `torch.compile`")
    fused_attention: bool = option(True, help="torch's scaled dot-product attention")
    grad_checkpointing: bool = option(False, help="compute activations again instead of keeping them")
    patience: int | None = option(None, ge=1, unit="epochs", help="without a better one, after which the run ends")
    extend: int = option(0, ge=0, unit="epochs", help="more, also of a finished run; see docs/training.md")
    select: str = option("best", choices=("best", "last"), help="the epoch that is kept")
    deterministic: bool = option(True, help="the same numbers in every run")


@dataclass
class CacheConfig:
    """Frozen features below the first trained site, computed once and replayed in every epoch.

    ``mode``: ``off``; ``memory``; ``disk`` (memory-mapped files in ``folder``, found again by a later run); or ``auto``:
    where it is possible, in memory within ``budget_gb``, else on disk.
    """

    mode: str = option("off", choices=("off", "auto", "memory", "disk"))
    dtype: str = option("fp32", choices=PRECISIONS, help="of stored features")
    budget_gb: float = option(4.0, ge=0, unit="GB", help="of memory")
    folder: str | None = option(None, free="a folder's path", help="of `disk`")


@dataclass
class WandbConfig:
    """Weights & Biases tracking; off unless asked for."""

    mode: str = option("disabled", choices=("disabled", "offline", "online"))
    project: str = option("vpeft", free="a project's name")
    entity: str | None = option(None, free="a user's or team's name")
    tags: list[str] = option([], free="a tag")


@dataclass
class Config:
    """A whole experiment."""

    name: str = option("run", free="a name for the run's folder", help="with which the run is found again")
    output: str = option("runs", free="the folder of all runs")
    task: str = option("classification", choices=TASKS)
    seed: int = option(0, ge=0, le=SEED, help="of weights, order of samples, and augmentation")
    resume: str = option(
        "auto", choices=("auto", "never", "changed"),
        help="an unfinished run of the same name goes on, is refused, or goes on with a changed rate, schedule or clipping",
    )  # fmt: skip
    overwrite: bool = option(False, help="replace a run of the same name, once the new one has its first state")
    init: str | None = option(None, free="a checkpoint", help="from which values start")
    origin: str | None = option(
        None,
        free="a sentence",
        help="the suite, task and recipe that it was made from; changes nothing",
    )
    report: str = option(
        "full",
        choices=("full", "none"),
        help="predictions, confusion matrix, reliability and a page of the run, or none of them",
    )
    tensorboard: bool = option(False, help="scalars for TensorBoard, in the run's folder `tensorboard`")
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    solve: SolveConfig = field(default_factory=SolveConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    seg: SegConfig = field(default_factory=SegConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


def load_config(file: str | Path, overrides: list[str] | tuple[str, ...] = (), *, tell: bool = True) -> DictConfig:
    """Read a YAML file with its bases and ``key.sub=value`` overrides into a checked, typed configuration.

    A file that names a suite (``suite: vtab``) becomes the ordinary configuration of one of its tasks.

    Args:
        file: its path, or the name of one that ships.
        overrides: of the command line.
        tell: say on stderr which recipe of a suite was taken.

    Raises:
        ConfigError: with the key's path, what was found, and the nearest valid name or value.
    """
    config = read_config(Config, file, overrides, tell=tell)
    check(config)
    return config


def resolved(file: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> str:
    """The YAML of ``load_config``'s answer without what is a default; as a file it gives the same configuration.

    Raises:
        ConfigError: as ``load_config``; an option that the method does not have, or cannot take.
    """
    from ..tasks.models import make_method

    config, default = load_config(file, overrides), OmegaConf.structured(Config)
    make_method(config)
    return OmegaConf.to_yaml(_beside(*(OmegaConf.to_container(c) for c in (config, default))))


def _beside(values: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """Those of some values that are no defaults."""
    found = {}
    for key, value in values.items():
        usual = default.get(key)
        if isinstance(value, dict) and isinstance(usual, dict) and usual:
            value = _beside(value, usual)
            if value:
                found[key] = value
        elif value != usual:
            found[key] = value
    return found


def from_container(values: dict) -> DictConfig:
    """A configuration from plain values, such as those stored inside a checkpoint or in a run's folder.

    Keys that came after the values were stored have the meaning of then.
    """
    config = merge(OmegaConf.structured(Config), OmegaConf.create(values))
    data = values.get("data")
    if isinstance(data, dict) and "fashion_mnist" not in data:
        source = data.get("source")
        if source == "motion" or (source == "scenes" and not data.get("root")):
            config.data.fashion_mnist = FASHION_ROOT  # there was no excerpt
    check(config)
    return config


def check_options(config: DictConfig) -> None:
    """Refuse what a key by itself may not be, as its field says.

    Raises:
        ConfigError: with the key's path, what was found, and what would be right.
    """
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise ConfigError(f"{getattr(error, 'full_key', None) or '?'}: {str(error).splitlines()[0]}") from error
    check_values(OmegaConf.get_type(config), values, ConfigError)


def check(config: DictConfig) -> None:
    """Refuse impossible values that types alone let through, and keys that do not go together."""
    if config.cache.mode == "False":  # YAML reads a bare off as no
        config.cache.mode = "off"
    check_options(config)
    for key in ("augment.scale", "augment.ratio", "augment.scale_jitter", "seg.scale"):
        pair = OmegaConf.select(config, key)
        if pair is not None and pair[0] > pair[1]:
            raise ConfigError(f"{key}: expected two numbers low <= high, got {list(pair)}")
    if config.schedule.warmup_epochs >= config.train.epochs and config.schedule.warmup_epochs:
        raise ConfigError(
            f"schedule.warmup_epochs: {config.schedule.warmup_epochs} must be below train.epochs {config.train.epochs}; "
            f"for a shorter run set schedule.warmup_epochs={config.train.epochs // 10} too"
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
