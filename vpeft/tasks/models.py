"""What tasks do alike with a configuration: the method, the timm model, its preprocessing, the check of its outputs."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from omegaconf import DictConfig, OmegaConf
from timm.data import resolve_data_config
from torch import nn

from ..data.presets import KEYS, PRESETS, preset_of
from ..errors import ConfigError, VpeftError, did_you_mean
from ..files import LONGEST_SHOWN
from ..methods import Method, create
from ..numerics import eval_mode

# Keys that only classification reads.
OF_BENCHMARKS = tuple(f"data.{key}" for key in ("preset", "shots", "list_seed", "image_root", "also_test"))


def make_method(config: DictConfig) -> Method:
    """The configuration's method.

    Raises:
        ConfigError: an unknown method or hyper-parameter, or an impossible value.
    """
    try:
        return create(config.method.name, **OmegaConf.to_container(config.method.options))
    except VpeftError as error:
        raise ConfigError(f"method: {error}") from error


def check_model_name(config: DictConfig) -> None:
    """Refuse a backbone that timm does not know, or that has no weights behind ``pretrained=true``."""
    name = config.model.name
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return
    if not timm.is_model(name):
        raise ConfigError(f"model.name: timm has no '{name}'{did_you_mean(name, timm.list_models())}")
    base, _, tag = name.partition(".")
    tags = [m.partition(".")[2] for m in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in tags and config.model.pretrained:
        raise ConfigError(f"model.name: '{base}' has no pretrained tag '{tag}'{did_you_mean(tag, tags)}")
    if config.model.pretrained and not config.model.checkpoint and not tags:
        raise ConfigError(f"model.pretrained: timm has no weights for '{name}'; set pretrained=false or give a checkpoint")


def check_weights(config: DictConfig) -> None:
    """Refuse a weight file that is not there, or that would not be read."""
    file = config.model.checkpoint
    if not file:
        return
    if not Path(file).is_file():
        kind = "is a folder" if Path(file).is_dir() else "does not exist"
        raise ConfigError(f"model.checkpoint: {file} {kind}; give a file of weights")
    if not config.model.pretrained:
        raise ConfigError("model.pretrained: false leaves model.checkpoint unread; set it to true, or give no file")


def check_augmentation(config: DictConfig) -> None:
    """Refuse augmentation that is asked for and off."""
    augment = config.augment
    asked = {
        "color_jitter": augment.color_jitter, "auto_augment": augment.auto_augment, "vflip": augment.vflip,
        "random_erasing": augment.random_erasing, "scale_jitter": augment.scale_jitter,
    }  # fmt: skip
    if not augment.enabled and any(asked.values()):
        key = next(k for k, v in asked.items() if v)
        raise ConfigError(f"augment.enabled: augment.{key} is set, but augmentation is off; set enabled=true")


def refuse_unused(config: DictConfig, keys: Iterable[str], why: str) -> None:
    """Refuse keys that have a value and would not act.

    Args:
        config: the experiment.
        keys: with their section, such as ``data.crop_pct``.
        why: they do not act, and what to set instead.

    Raises:
        ConfigError: names the key.
    """
    default = OmegaConf.structured(OmegaConf.get_type(config)) if OmegaConf.get_type(config) is not dict else None
    for key in keys:
        value = OmegaConf.select(config, key)
        if value != (None if default is None else OmegaConf.select(default, key)):
            raise ConfigError(f"{key}: {why}")


def _pretrained_cfg(name: str) -> dict:
    """timm's data config of a model's weights, without building the model; a tag that timm lacks falls to the default."""
    cfg = timm.get_pretrained_cfg(name) if "." in name else None
    cfg = cfg or timm.get_pretrained_cfg(name.partition(".")[0])
    return cfg.to_dict() if cfg is not None else {}


def build_model(config: DictConfig, num_classes: int, keep_head: bool = False) -> nn.Module:
    """The timm model with a fresh head for ``num_classes``, or, with ``keep_head``, with the head of its weights."""
    m = config.model
    # Fused attention is slower than the plain form on small models in bf16 on CPU.
    timm.layers.set_fused_attn(config.train.fused_attention)
    kwargs: dict[str, Any] = OmegaConf.to_container(m.kwargs)  # plain lists: timm hands them to torch
    if m.img_size:
        kwargs["img_size"] = m.img_size
    if m.drop_path:
        kwargs["drop_path_rate"] = m.drop_path
    if m.drop:
        kwargs["drop_rate"] = m.drop
    if m.checkpoint:
        kwargs["pretrained_cfg_overlay"] = {"file": m.checkpoint}
    if keep_head:
        return create_timm(config, pretrained=m.pretrained, **kwargs)
    if m.pretrained and not m.keep_head:
        # Without a classifier first: weights with the same class count would bring their own.
        model = create_timm(config, pretrained=True, num_classes=0, **kwargs)
        model.reset_classifier(num_classes)
        return model
    if m.pretrained and m.checkpoint and num_classes:
        return _with_own_head(config, num_classes, kwargs)
    return create_timm(config, pretrained=m.pretrained, num_classes=num_classes, **kwargs)


def create_timm(config: DictConfig, **kwargs: Any) -> nn.Module:
    """timm's model of the configuration's name; what timm, its hub and torch say of it in one line.

    Raises:
        ConfigError: names the key that is the likeliest to be wrong.
    """
    m = config.model
    try:
        return timm.create_model(m.name, **kwargs)
    except Exception as error:  # models, weight files and the hub fail with errors of no common class
        key = "model.checkpoint" if m.checkpoint and kwargs["pretrained"] else "model.pretrained"
        key = "model.kwargs" if isinstance(error, (TypeError, AssertionError)) or not kwargs["pretrained"] else key
        text = " ".join(str(error).split())
        text = text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"
        of = f" with {m.checkpoint}" if key == "model.checkpoint" else ""
        raise ConfigError(f"{key}: timm does not build '{m.name}'{of}: {type(error).__name__}: {text}") from error


def _with_own_head(config: DictConfig, num_classes: int, kwargs: dict[str, Any]) -> nn.Module:
    """The model with all that the configuration's weight file holds, the classifier included."""
    m = config.model
    # Unless the file is said to have as many classes as the model, timm leaves its classifier out.
    kwargs["pretrained_cfg_overlay"]["num_classes"] = num_classes
    try:
        return timm.create_model(m.name, pretrained=True, num_classes=num_classes, **kwargs)
    except RuntimeError as error:
        raise ConfigError(
            f"model.keep_head: {m.checkpoint} does not hold {m.name} with a classifier for {num_classes} classes: {error}"
        ) from error


@torch.no_grad()
def check_outputs(model: nn.Module, size: Sequence[int], num_classes: int) -> None:
    """Refuse a model whose outputs are not one per class (a frozen classifier that nothing maps).

    Args:
        model: as the loop calls it.
        size: of one of its inputs.
        num_classes: of the data.

    Raises:
        ConfigError: names both numbers.
    """
    like = next(model.parameters())
    with eval_mode(model):
        width = model(torch.zeros(1, *size, dtype=like.dtype, device=like.device)).shape[-1]
    if width != num_classes:
        raise ConfigError(f"method.options.classes: the model gives {width} outputs for {num_classes} classes of the data")


def data_stats(config: DictConfig) -> dict[str, Any]:
    """timm's data config of the model (input_size, mean, std, interpolation, crop) under the preset and the section's keys.

    No model is built for it. The preset's name stands beside it.

    Raises:
        ConfigError: statistics of another number of channels than three.
    """
    d = config.data
    for key in ("mean", "std"):
        if d[key] is not None and len(d[key]) not in (1, 3):
            raise ConfigError(f"data.{key}: {len(d[key])} numbers; images have 3 colours, give 3 or 1")
    preset = preset_of(d)
    overrides = dict(PRESETS[preset]) | {k: d[k] for k in KEYS if d[k] is not None}
    overrides |= {k: list(overrides[k]) for k in ("mean", "std") if k in overrides}
    if config.model.img_size:
        overrides["input_size"] = (3, config.model.img_size, config.model.img_size)
    return resolve_data_config(overrides, pretrained_cfg=_pretrained_cfg(config.model.name)) | {"preset": preset}
