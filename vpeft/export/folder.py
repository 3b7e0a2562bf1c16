"""A folder that timm loads by itself: ``timm.create_model("local-dir:FOLDER", pretrained=True)``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ..backbone.embedded import PLAIN
from ..backbone.reading import input_size
from ..data.presets import TF_BILINEAR
from ..errors import MethodError, UnsupportedModelError, some
from ..files import write_tensors, write_text
from ..tuning.summary import model_name
from .source import BATCHES, Exportable

FILES = ("config.json", "model.safetensors")
# In config.json, where timm does not look: any download from the Hub has these two files.
MARK = {"written_by": "vpeft export"}
# Of timm's ``PretrainedCfg``: what describes a model and its images, and not where other weights lie.
DESCRIBING = (
    "tag", "input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "pool_size",
    "first_conv", "classifier", "license", "description", "origin_url", "paper_name", "paper_ids", "notes",
)  # fmt: skip
# Arguments of timm's factory that say where weights come from, or what to make of the model; they shape nothing.
NOT_SHAPING = (
    "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "scriptable", "exportable", "no_jit",
    "pretrained_strict", "num_classes",
)  # fmt: skip
IMAGES = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


def strange(path: Path) -> str:
    """What shows that something at a path is no folder that ``write`` wrote; empty where nothing does."""
    if path.is_symlink() or not path.is_dir():
        return "a link" if path.is_symlink() else "a file"
    others = some(sorted({p.name for p in path.iterdir()} - set(FILES)))
    return others or ("" if _marked(path / FILES[0]) else f"{FILES[0]} does not say so")


def _marked(file: Path) -> bool:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and all(config.get(k) == v for k, v in MARK.items())


def check(source: Exportable) -> None:
    """Refuse what timm alone cannot rebuild, before anything is merged.

    Raises:
        UnsupportedModelError: there is more than a timm model, or one that timm itself does not know.
    """
    if not source.whole:
        raise UnsupportedModelError(
            f"a timm folder holds a timm model of images alone, but this is the whole of task={source.task} (a decode head, "
            "clips); choose the format torch or onnx, which hold all of it"
        )
    if source.data.get("interpolation") == TF_BILINEAR:
        raise UnsupportedModelError(
            "its preset resizes images as TensorFlow does, which timm's transforms do not; choose the format torch or onnx"
        )
    _entry(source.backbone)
    if any(p.dtype == torch.float64 for p in source.backbone.parameters()):
        raise UnsupportedModelError("timm builds float32 models, which float64 does not fit into; call model.float() first")


def write(source: Exportable, folder: Path) -> None:
    """Write the plain model, what it is built from, and how its images are prepared.

    Raises:
        UnsupportedModelError: it was built from what JSON cannot hold.
    """
    model = source.backbone
    architecture, args = _entry(model)
    args |= {k: v for k, v in (source.model_args or {}).items() if k not in NOT_SHAPING and v is not None}
    cfg = _pretrained_cfg(model, source.data, args)
    config: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
    }
    pool = getattr(model, "global_pool", None)
    config |= {"global_pool": pool} if isinstance(pool, str) and pool else {}
    config |= {"label_names": source.class_names} if source.class_names else {}
    config |= {"model_args": args} if args else {}
    config |= {"pretrained_cfg": cfg} | MARK
    for name, value in args.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise UnsupportedModelError(
                f"the model was built with {name}={value!r}, which a timm folder cannot hold"[:300]
            ) from None
    write_text(folder / FILES[0], json.dumps(config, indent=2) + "\n")
    write_tensors(folder / FILES[1], model.state_dict())


def _entry(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """timm's own name for the architecture, and what must be given with it.

    Raises:
        UnsupportedModelError: it is registered by somebody else.
    """
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if name in PLAIN:
        plain, args = PLAIN[name]
        return plain, dict(args)
    if not name or not timm.is_model(name) or not timm.model_entrypoint(name).__module__.startswith("timm."):
        raise UnsupportedModelError(
            f"{model_name(model)} is none of timm's own architectures, so timm alone cannot build it; choose the format "
            "torch or onnx"
        )
    return name, {}


def _pretrained_cfg(model: nn.Module, data: Mapping[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    """timm's record of the model, with the images' preparation of ``data``; a changed size goes into ``args`` too."""
    own, size = model.pretrained_cfg, input_size(model)
    cfg = {k: own[k] for k in DESCRIBING if own.get(k) is not None}
    cfg |= {k: data[k] for k in IMAGES if data.get(k) is not None}
    shown = data.get("input_size") or size
    if tuple(shown[-2:]) != size[-2:]:  # a model of any size, which sees images of another than it was built for
        cfg["fixed_input_size"] = False
        args["img_size"] = list(size[-2:])
    elif "img_size" in args:
        args["img_size"] = list(size[-2:])
    cfg |= {"input_size": [size[0], *shown[-2:]], "num_classes": model.num_classes, "custom_load": False}
    return cfg


@torch.no_grad()
def verify(source: Exportable, folder: Path) -> None:
    """Compare what timm makes of the folder with the model, bit for bit.

    Raises:
        UnsupportedModelError: timm does not build it.
        MethodError: timm builds something else.
    """
    model = source.backbone
    try:
        other = timm.create_model(f"local-dir:{folder}", pretrained=True).to(next(model.parameters()).dtype).eval()
    except Exception as error:  # of whatever kind: models and their weights fail with errors of no common class
        text = " ".join(str(error).split())[:500]
        raise UnsupportedModelError(
            f"timm does not build {model_name(model)} again from its name and arguments: {type(error).__name__}: {text}; "
            f"{_advice(source)}"
        ) from error
    mine, theirs = model.state_dict(), other.state_dict()
    differ = sorted(n for n in mine.keys() | theirs.keys() if not _same(mine.get(n), theirs.get(n)))
    if differ:
        raise MethodError(f"timm's own model differs from the merged one in {some(differ)}; {_advice(source)}")
    for name, part in other.named_modules():  # the same kernels: timm chooses when a model is built
        if hasattr(part, "fused_attn"):
            model.get_submodule(name).fused_attn = part.fused_attn
    for batch in BATCHES:
        x = source.inputs(batch)
        if not torch.equal(model(x), other(x)):
            raise MethodError(f"timm's own model computes something else from the same weights; {_advice(source)}")


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _advice(source: Exportable) -> str:
    if source.model_args is None:
        return "say what timm.create_model was given (model_args=…), or choose the format torch or onnx"
    return "choose the format torch or onnx, which hold the model as it is"
