"""``vpeft mmseg-config``: a stock configuration of mmsegmentation rewritten for an adapted timm backbone."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mmseg
import timm
import torch
from mmengine.config import Config
from mmengine.model import BaseModule
from mmengine.utils import import_modules_from_strings
from omegaconf import OmegaConf
from timm.data import resolve_data_config
from torch import Tensor

from ...backbone.maps import map_count
from ...errors import VpeftError, nearest
from ...files import write_text
from .backbone import TimmBackbone
from .fitting import as_list, check_parts, fit, map_numbers, name_of, wants_pyramid
from .registries import VPEFT_MODELS

MODULE = "vpeft.integrations.mmseg"
ELSEWHERE = ("mmpretrain", "mmdet")  # packages of stock backbones and heads, with operators of mmcv
KEPT_OF_OPTIMISER = ("type", "clip_grad", "accumulative_counts", "loss_scale", "dtype")


@dataclass
class Choice:
    """What stands in the place of a stock configuration's backbone.

    Attributes:
        model: timm's name.
        method: name of the method.
        options: of the method.
        lr: of the optimiser.
        pretrained: load timm's weights.
        model_kwargs: more keywords of ``timm.create_model``.
        sync_bn: keep SyncBN, for several GPUs.
    """

    model: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 1e-4
    pretrained: bool = True
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    sync_bn: bool = False

    def check(self) -> None:
        """Refuse a model that timm does not have, or has no weights of.

        Raises:
            VpeftError: says which.
        """
        if not timm.is_model(self.model):
            raise VpeftError(f"--model: timm has no '{self.model}'{nearest(self.model, timm.list_models())}")
        if self.pretrained and not timm.is_model_pretrained(self.model):
            raise VpeftError(
                f"--model: timm has no weights for '{self.model}', and a frozen model of random ones learns little"
            )
        if not 0 < self.lr < math.inf:
            raise VpeftError(f"--lr: {self.lr} must be a number above 0")
        if "name" in self.options:
            raise VpeftError(f"--options: name={self.options['name']} is no option of a method; give --method")


def pairs(where: str, items: Iterable[str]) -> dict[str, Any]:
    """``key=value`` of a command line, each value read as YAML.

    Raises:
        VpeftError: names what is no such pair.
    """
    found: dict[str, Any] = {}
    for item in items:
        key, sign, value = item.partition("=")
        try:
            found[key] = OmegaConf.to_container(OmegaConf.create(f"value: {value}"))["value"]
        except Exception as error:  # yaml's own errors have several unrelated classes
            raise VpeftError(f"{where}: {item}: {error}") from error
        if not (sign and key.isidentifier()):
            raise VpeftError(f"{where}: '{item}' is not key=value")
    return found


def stock_file(name: str) -> Path:
    """The file of a configuration: a path, or the name of one that mmsegmentation ships, with or without ``mmseg::``.

    Raises:
        VpeftError: there is none.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = Path(mmseg.__path__[0]) / ".mim" / "configs"
    wanted = name.removeprefix("mmseg::").removeprefix("configs/")
    wanted = wanted if wanted.endswith(".py") else f"{wanted}.py"
    if (shipped / wanted).is_file():
        return shipped / wanted
    files = {file.name: file for file in shipped.glob("*/*.py")}
    if wanted in files:
        return files[wanted]
    raise VpeftError(f"{name}: there is no such file, and mmsegmentation ships none of that name{nearest(wanted, files)}")


def read_stock(file: Path) -> Config:
    """A configuration, whose modules are imported but for those that the new backbone makes needless.

    Raises:
        VpeftError: it is none, or what it imports is not there.
    """
    try:
        cfg = Config.fromfile(file, import_custom_modules=False)
    except Exception as error:  # a configuration is a program
        raise VpeftError(f"{file}: no configuration of mmengine: {type(error).__name__}: {error}") from error
    if not isinstance(cfg.get("model"), dict):
        raise VpeftError(f"{file}: there is no model in it; take one that trains, not a part in _base_")
    imports = as_list((cfg.get("custom_imports") or {}).get("imports"))
    kept = [name for name in imports if not name.startswith(ELSEWHERE)]
    cfg.custom_imports = {"imports": [*dict.fromkeys([*kept, MODULE])], "allow_failed_imports": False}
    try:
        import_modules_from_strings(**cfg.custom_imports)
    except ImportError as error:
        raise VpeftError(f"{file}: custom_imports: {error}") from error
    return cfg


def rewrite(cfg: Config, choice: Choice) -> list[str]:
    """Give a configuration an adapted timm backbone, and all that goes with it, in place; returns what was done, in words.

    Args:
        cfg: as ``read_stock`` gives it.
        choice: the backbone and its method.

    Raises:
        VpeftError: what cannot be rewritten, and why.
    """
    choice.check()
    model = cfg.model
    check_parts(model)
    size = _crop(cfg)
    section, backbone = _backbone(model, choice, size)
    notes = [f"backbone: {name_of(model.backbone)} -> {choice.model} with {choice.method}"]
    notes += fit(model, backbone)
    model.backbone, model.pretrained = section, None
    notes += _normalise(cfg, choice, size)
    notes += _optimise(cfg, choice)
    notes += _save(cfg)
    for name in ("checkpoint", "checkpoint_file"):  # weights of the old backbone
        if isinstance(cfg.get(name), str):
            cfg.pop(name)
    if cfg.get("load_from"):
        notes.append(f"load_from={cfg.load_from} is gone: weights of the old model")
        cfg.load_from = None
    if not choice.sync_bn and _without_sync_bn(cfg._cfg_dict):
        notes.append("SyncBN -> BN, for one GPU or none; for several put SyncBN back (--sync-bn)")
    _try(model, backbone)
    return notes


def _crop(cfg: Config) -> tuple[int, int] | None:
    """(height, width) of the training crop, where the configuration says it."""
    loader = cfg.get("train_dataloader") or {}
    pipeline = (loader.get("dataset") or {}).get("pipeline") or cfg.get("train_pipeline") or []
    crops = [step.get("crop_size") for step in pipeline if isinstance(step, dict) and step.get("type") == "RandomCrop"]
    given = [(cfg.model.get("data_preprocessor") or {}).get("size"), *crops, cfg.get("crop_size")]
    size = next((s for s in given if s), None)
    return (size, size) if isinstance(size, int) else None if size is None else tuple(size)


def _backbone(model: dict, choice: Choice, size: tuple[int, int] | None) -> tuple[dict, TimmBackbone]:
    """The new section, and the backbone that it makes, without values."""
    known = {"model": choice.model, "model_kwargs": dict(choice.model_kwargs), "pretrained": False}
    with torch.device("meta"):  # its shapes alone are of interest
        probe = _made(timm.create_model, choice.model, num_classes=0, **choice.model_kwargs)
    count, patch = map_count(probe), getattr(getattr(probe, "patch_embed", None), "patch_size", (1, 1))
    strides = {info["reduction"] for info in probe.feature_info}
    own = getattr(getattr(probe, "patch_embed", None), "img_size", None)
    if size is not None and tuple(size) != tuple(own or ()):
        known["img_size"] = tuple(-(-s // p) * p for s, p in zip(size, patch, strict=True))
    numbers = map_numbers(model)
    flat = len(strides) == 1
    if numbers == 1 and flat:
        indices = (count - 1,)
    else:
        indices = tuple(sorted({(i + 1) * count // 4 - 1 for i in range(4)} - {-1})) if flat else tuple(range(count))[-4:]
    section = {"type": "vpeft.TimmBackbone", **known, "out_indices": indices}
    section["method"] = {"name": choice.method, **choice.options}
    if flat and wants_pyramid(model):
        section["pyramid"] = "feature2pyramid"
    if not flat:
        section["norm"] = "layer"
    if any(name_of(head) == "DPTHead" for head in as_list(model.get("decode_head"))):
        section["class_token"] = True
        section.pop("norm", None)
    with torch.device("meta"):
        built = _made(TimmBackbone, **{k: v for k, v in section.items() if k != "type"})
    section["pretrained"] = choice.pretrained
    return {k: v for k, v in section.items() if v != {}}, built


def _made(make: Callable, *args: Any, **kwargs: Any) -> Any:
    try:
        return make(*args, **kwargs)
    except TypeError as error:  # of timm's class
        key = "--model" if "'img_size'" in str(error) else "--model-kwargs"
        raise VpeftError(f"{key}: {error}{'; take a ViT or a Swin' if key == '--model' else ''}") from error


def _normalise(cfg: Config, choice: Choice, size: tuple[int, int] | None) -> list[str]:
    """Images as the timm model wants them."""
    base = timm.get_pretrained_cfg(choice.model) or timm.get_pretrained_cfg(choice.model.partition(".")[0])
    stats = resolve_data_config({}, pretrained_cfg=base.to_dict() if base else {})
    values = {name: [round(255 * v, 4) for v in stats[name]] for name in ("mean", "std")} | {"bgr_to_rgb": True}
    preprocessors = [p for p in (cfg.model.get("data_preprocessor"), cfg.get("data_preprocessor")) if isinstance(p, dict)]
    if not preprocessors:
        cfg.model.data_preprocessor = {"type": "SegDataPreProcessor", "pad_val": 0, "seg_pad_val": 255}
        preprocessors = [cfg.model.data_preprocessor]
    for preprocessor in preprocessors:
        preprocessor.update(values)
        if size is not None and not preprocessor.get("size") and not preprocessor.get("size_divisor"):
            preprocessor["size"] = size
    return [f"images are normalised as {choice.model}'s were: mean {values['mean']}, std {values['std']}"]


def _optimise(cfg: Config, choice: Choice) -> list[str]:
    """AdamW over what is trained alone, and schedules that end at the same share of its rate."""
    old = cfg.get("optim_wrapper") or {}
    before = (old.get("optimizer") or {}).get("lr")
    wrapper = {k: old[k] for k in KEPT_OF_OPTIMISER if k in old} or {"type": "OptimWrapper"}
    wrapper |= {
        "constructor": "vpeft.TrainedOnly",
        "optimizer": {"type": "AdamW", "lr": choice.lr, "betas": (0.9, 0.999), "weight_decay": 0.01},
    }
    custom = (old.get("paramwise_cfg") or {}).get("custom_keys") or {}
    if (custom.get("head") or {}).get("lr_mult"):
        wrapper["paramwise_cfg"] = {"head_lr_mult": custom["head"]["lr_mult"]}
    cfg.optim_wrapper = wrapper
    cfg.pop("optimizer", None)
    for scheduler in as_list(cfg.get("param_scheduler")):
        if before and scheduler.get("eta_min"):
            scheduler["eta_min"] = scheduler["eta_min"] * choice.lr / before
    notes = [f"optimiser: AdamW over the trained parameters alone, lr {choice.lr:g}; the stock one had lr {before}"]
    if name_of(wrapper) == "AmpOptimWrapper":
        notes.append("AmpOptimWrapper stays, which needs a GPU")
    return notes


def _save(cfg: Config) -> list[str]:
    """SaveTrained in the place of CheckpointHook."""
    hooks = cfg.setdefault("default_hooks", {})
    old = hooks.get("checkpoint") or {}
    hook: dict[str, Any] = {"type": "vpeft.SaveTrained"}
    if isinstance(old.get("interval"), int) and old["interval"] > 0:
        hook["interval"] = old["interval"]
    elif "EpochBased" in str((cfg.get("train_cfg") or {}).get("type")) or (cfg.get("train_cfg") or {}).get("by_epoch"):
        hook["interval"] = 1
    if isinstance(old.get("max_keep_ckpts"), int) and old["max_keep_ckpts"] > 0:
        hook["keep"] = old["max_keep_ckpts"]
    measured = [m for e in as_list(cfg.get("val_evaluator")) for m in e.get("iou_metrics", ())]
    best = old.get("save_best") or ("mIoU" if "mIoU" in measured else None)
    if best:
        hook["save_best"] = best
    if old.get("rule"):
        hook["rule"] = old["rule"]
    hooks["checkpoint"] = hook
    return [f"checkpoints: {hook}"]


def _without_sync_bn(part: Any) -> bool:
    """Replace SyncBN by BN wherever it stands; whether it stood anywhere."""
    found = False
    if isinstance(part, dict):
        if part.get("type") == "SyncBN":
            part["type"], found = "BN", True
        values = part.values()
    else:
        values = part if isinstance(part, list | tuple) else ()
    for value in values:
        found = _without_sync_bn(value) or found
    return found


@VPEFT_MODELS.register_module()
class BlankMaps(BaseModule):
    """In place of a backbone while its heads are tried: maps of the same shapes, of zeros.

    Args:
        channels: of each map.
        strides: of each map.
        class_token: give a class token beside each.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[float], class_token: bool = False):
        super().__init__()
        self.channels, self.strides, self.class_token = channels, strides, class_token

    def forward(self, x: Tensor) -> tuple:
        """Images (B, 3, H, W) to maps (B, C, H / s, W / s)."""
        pairs = zip(self.channels, self.strides, strict=True)
        sizes = [(len(x), c, round(x.shape[2] / s), round(x.shape[3] / s)) for c, s in pairs]
        if self.class_token:
            return tuple((x.new_zeros(size), x.new_zeros(size[:2])) for size in sizes)
        return tuple(x.new_zeros(size) for size in sizes)


def _try(model: dict, backbone: TimmBackbone) -> None:
    """Build the neck and the heads, of random weights, and send maps of zeros through them.

    Raises:
        VpeftError: what does not fit.
    """
    from mmseg.registry import MODELS

    maps = backbone.maps
    side = int(4 * max(*maps.strides, 16))
    sizes = {"img_shape": (side, side), "ori_shape": (side, side), "pad_shape": (side, side)}
    blank = {"type": "vpeft.BlankMaps", "channels": maps.channels, "strides": maps.strides, "class_token": maps.class_token}
    try:
        built = MODELS.build(Config({**model, "backbone": blank, "_scope_": "mmseg"})._cfg_dict).eval()
        with torch.no_grad():
            built.encode_decode(torch.zeros(1, 3, side, side), [sizes])
    except Exception as error:  # of whatever class mmsegmentation raises
        kinds = ", ".join(name_of(head) for head in as_list(model["decode_head"]))
        raise VpeftError(f"decode_head: {kinds} does not run on these maps: {type(error).__name__}: {error}") from error


def write_stock(stock: str, out: str | Path, choice: Choice, overwrite: bool = False) -> list[str]:
    """Rewrite a stock configuration into a file of its own, whole or not at all; returns what was done, in words.

    Args:
        stock: see ``stock_file``.
        out: the file to write, which depends on no other.
        choice: the backbone and its method.
        overwrite: take the place of a file that is there.

    Raises:
        VpeftError: what cannot be rewritten, and why; nothing is written then.
    """
    out = Path(out)
    if out.suffix != ".py":
        raise VpeftError(f"--out: {out} must end in .py, as configurations do")
    if out.exists() and not overwrite:
        raise VpeftError(f"--out: {out} is there already; --overwrite replaces it")
    file = stock_file(stock)
    if out.exists() and out.samefile(file):
        raise VpeftError(f"--out: {out} is the stock configuration itself")
    cfg = read_stock(file)
    notes = rewrite(cfg, choice)
    head = [f"{file.name} of mmsegmentation, rewritten by: vpeft mmseg-config", *(f"- {note}" for note in notes)]
    write_text(out, "".join(f"# {line}\n" for line in head) + cfg.pretty_text)
    return notes
