"""One YAML per experiment, typed: unknown keys, wrong types and impossible values are refused with the key's path."""

import sys
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..data.embedded import FASHION_ROOT
from ..errors import ConfigError, did_you_mean
from ..options import LARGEST, SEED, SIZE, check_values, nonnegative, option, probability
from ..tasks.registry import TASKS, task_class
from ..tasks.segmentation.config import ScenesConfig, SegConfig
from ..tasks.video.config import MotionConfig, VideoConfig
from .shipped import like, local_or_shipped

PRECISIONS = ("fp32", "bf16", "fp16")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
# What is exchanged by its name, and where its own options are, which mean nothing to another one.
OPTIONS_OF = {"method.name": "method.options", "optim.name": "optim.kwargs", "seg.head": "seg.options"}

__all__ = [
    "PRECISIONS", "AugmentConfig", "CacheConfig", "Config", "DataConfig", "MethodConfig", "ModelConfig", "MotionConfig",
    "OptimConfig", "ScenesConfig", "ScheduleConfig", "SegConfig", "TrainConfig", "VideoConfig", "WandbConfig", "check",
    "check_options", "from_container", "load_config", "merge", "read_config", "why_no_cache",
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
    mean: list[float] | None = option(None, length=(1, 1000), help="of each channel")
    std: list[float] | None = option(None, ge=1e-6, length=(1, 1000), help="of each channel")
    interpolation: str | None = option(
        None, choices=("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"), help="with which images are resized"
    )
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
    cache: CacheConfig = field(default_factory=CacheConfig)
    seg: SegConfig = field(default_factory=SegConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


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
    layers, given = _read(local_or_shipped(Path(file)), ()), []
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"override '{item}': expected key.sub=value")
        try:
            given.append(OmegaConf.from_dotlist([item]))
        except Exception as error:  # yaml's own errors have several unrelated classes
            raise ConfigError(f"override '{item}': {error}") from error
    config = OmegaConf.structured(schema)
    for layer in layers:
        config = _laid(config, layer, layer)
    for layer in given:  # on the command line, the name may stand behind its options
        config = _laid(config, layer, OmegaConf.merge(*given) if layer is given[0] else None)
    return config


def _laid(config: DictConfig, layer: DictConfig, names: DictConfig | None) -> DictConfig:
    """A layer laid over what lies below: the options of what it exchanges go, and an empty mapping empties one.

    Args:
        config: what lies below.
        layer: to be laid over it.
        names: where to look for names that exchange something.
    """
    for key, options in OPTIONS_OF.items():
        new = None if names is None else OmegaConf.select(names, key, throw_on_resolution_failure=False)
        old, dropped = OmegaConf.select(config, key), OmegaConf.select(config, options)
        if isinstance(new, str) and new != old and dropped:
            print(
                f"{key}={new}: the {options.rpartition('.')[2]} of {old} are dropped ({', '.join(dropped)})", file=sys.stderr
            )
            OmegaConf.update(config, options, {}, merge=False)
    for key in _empty(layer):
        node = OmegaConf.select(config, key, throw_on_missing=False)
        if OmegaConf.is_dict(node) and OmegaConf.get_type(node) is dict:
            OmegaConf.update(config, key, {}, merge=False)
    return merge(config, layer)


def _empty(layer: Any, path: str = "") -> Iterator[str]:
    """The keys of empty mappings."""
    for key in layer:
        if OmegaConf.is_interpolation(layer, key) or OmegaConf.is_missing(layer, key):
            continue
        where = f"{path}.{key}" if path else str(key)
        if OmegaConf.is_dict(layer[key]):
            if not layer[key]:
                yield where
            yield from _empty(layer[key], where)


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
        near = [str(p) for p in file.parent.glob("*.yaml")] if file.parent.is_dir() else like(file)
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
        if OmegaConf.is_interpolation(values, key) or OmegaConf.is_missing(values, key):
            continue  # known only when all layers lie on each other
        kind, value = known[key].type, values[key]
        if is_dataclass(kind) and value is not None:
            _check_keys(kind, value, where)
        elif typing.get_origin(kind) is list and is_dataclass(typing.get_args(kind)[0]) and OmegaConf.is_list(value):
            for number, item in enumerate(value):
                _check_keys(typing.get_args(kind)[0], item, f"{where}[{number}]")


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
