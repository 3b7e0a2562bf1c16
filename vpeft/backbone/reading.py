"""Reading a model: which blocks it has, in which order they run, and that a hooked module is called at all."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.models import FeatureDictNet, FeatureHookNet
from torch import Tensor, nn

from ..errors import UnsupportedModelError, VpeftError
from ..numerics import eval_mode
from .modules import CONTAINER, QKV_SLOTS, BlockSite, ModuleRef

# A block may have these parts and no other that holds parameters; anything else would act where we do not know of it.
_BLOCK_PARTS = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}


def input_size(model: nn.Module) -> tuple[int, ...]:
    """(channels, height, width) that the model is built for; (channels, frames, height, width) where it takes clips."""
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    channels, height, width = cfg.get("input_size", (3, 224, 224))
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
    weights = next((m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)), None)
    frames = getattr(embed, "frames", None)
    clip = () if frames is None else (int(frames),)
    return (weights.in_channels if weights is not None else channels), *clip, int(height), int(width)


def model_inside(model: nn.Module) -> str | None:
    """The path of the timm model inside of a wrapper (DataParallel, a compiled model, Sequential, a class of one's own).

    None where the model is no wrapper: it has timm's ``forward_features`` itself, or nothing inside has.
    """
    if hasattr(type(model), "forward_features"):
        return None
    return next((path for path, m in model.named_modules() if path and hasattr(type(m), "forward_features")), None)


def is_taken_apart(model: nn.Module) -> bool:
    """Whether timm made a list of stages of the model (``features_only=True`` of a Swin), in which nothing of it is left."""
    return isinstance(model, FeatureDictNet | FeatureHookNet)


def _find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    found, almost = [], {}
    modules = {path: module for path, module in model.named_modules() if not path.startswith(CONTAINER)}
    for path, module in modules.items():
        missing = [p for p in ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2") if not _has(module, p)]
        if not missing:
            reason = _block_reason(module, modules[path.rpartition(".")[0]])
            if reason is None:
                found.append((path, module))
            else:
                almost.setdefault(type(module).__name__, reason)
        elif _has(module, "attn"):  # an attention block of another shape; a convolution's norm1 is no matter
            while isinstance(modules[path], nn.Sequential | nn.ModuleList | nn.ModuleDict):
                path = path.rpartition(".")[0]
            almost.setdefault(type(modules[path]).__name__, f"no {', '.join(missing)}")
    name = type(model).__name__
    if almost:
        text = "; ".join(f"{k}: {v}" for k, v in almost.items())
        raise UnsupportedModelError(f"{name} has blocks that cannot be read as norm1, attention, norm2, mlp ({text})")
    if not found:
        raise UnsupportedModelError(
            f"{name} has no transformer blocks: no module with norm1, attn, drop_path1, norm2, mlp and drop_path2"
        )
    return found


def _block_reason(module: nn.Module, parent: nn.Module) -> str | None:
    """Why a module that has all parts of a block cannot be taken for one, or None."""
    strange = [n for n, m in module.named_children() if n not in _BLOCK_PARTS and any(True for _ in m.parameters())]
    if strange:
        return f"it also has {', '.join(strange)}"
    if not isinstance(parent, nn.Sequential | nn.ModuleList):
        return f"it is a part of {type(parent).__name__}"
    return _attention_reason(module.attn)


def _has(module: nn.Module, part: str) -> bool:
    return isinstance(getattr(module, part, None), nn.Module)


def _attention_reason(attn: nn.Module) -> str | None:
    """Why an attention's projections cannot be told apart, or None."""
    name = type(attn).__name__
    heads = getattr(attn, "num_heads", None)
    if not isinstance(getattr(attn, "proj", None), nn.Linear):
        return f"its {name} has no linear proj"
    qkv = getattr(attn, "qkv", None)
    if isinstance(qkv, nn.Linear):
        head_dim = getattr(attn, "head_dim", None) or getattr(attn, "dim_head", None)
        if heads is None or qkv.out_features % 3 or (qkv.out_features // 3) % heads:
            return f"its {name}.qkv does not split into queries, keys and values"
        if isinstance(head_dim, int) and qkv.out_features % (3 * head_dim):
            return f"its {name}.qkv does not split into heads of {head_dim}"
        return None
    if all(isinstance(getattr(attn, f"{s}_proj", None), nn.Linear) for s in QKV_SLOTS):
        return None
    return f"its {name} has neither a linear qkv nor q_proj, k_proj and v_proj"


def _read_blocks(model: nn.Module, found: list[tuple[str, nn.Module]], size: tuple) -> list[BlockSite]:
    """Watch one dry forward: which blocks run, in which order, on which layout, and where their norms stand."""
    order: list[int] = []
    inputs: dict[int, Tensor] = {}
    pre_norm: dict[int, bool] = {}
    maps: dict[int, bool] = {}
    widths: dict[int, int] = {}
    windowed: dict[int, bool] = {}
    handles = []
    for i, (_, block) in enumerate(found):

        def enter(module, args, kwargs, i=i):
            x = args[0] if args else kwargs["x"]
            order.append(i)
            inputs[i], maps[i], widths[i] = x, x.ndim == 4, x.shape[-1]

        def norm(module, args, i=i):
            # The same numbers at the same place: norm1 reads the block's input, so the block is pre-norm.
            pre_norm[i] = i in inputs and args[0].shape == inputs[i].shape and args[0] is inputs[i]

        def end(module, args, output, i=i):
            windowed[i] = i in inputs and output.shape != inputs[i].shape

        handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(block.norm1.register_forward_pre_hook(norm))
        handles.append(block.drop_path1.register_forward_hook(end))
    try:
        dry_forward(model, size, again=order.clear)
    finally:
        for handle in handles:
            handle.remove()
    if sorted(order) != list(range(len(found))):
        lost = sorted(set(range(len(found))) - set(order)) or sorted({i for i in order if order.count(i) > 1})
        paths = ", ".join(found[i][0] for i in lost[:4])
        raise UnsupportedModelError(f"{type(model).__name__}: blocks that do not run exactly once in a forward: {paths}")
    stages: dict[str, int] = {}
    blocks = []
    for index, i in enumerate(order):
        path, block = found[i]
        stage = stages.setdefault(path.rpartition(".")[0], len(stages))
        parts = {
            field: ModuleRef(f"{path}.{name}", getattr(block, name))
            for field, name in (
                ("norm1", "norm1"), ("attn", "attn"), ("branch1", "drop_path1"),
                ("norm2", "norm2"), ("mlp", "mlp"), ("branch2", "drop_path2"),
            )
        }  # fmt: skip
        facts = (pre_norm.get(i, False), maps[i], windowed.get(i, False))
        blocks.append(BlockSite(path, block, index, stage, widths[i], *facts, **parts))
    return blocks


def dry_forward(
    model: nn.Module,
    size: tuple[int, ...],
    run: Callable[[Tensor], Any] | None = None,
    again: Callable[[], None] | None = None,
) -> Any:
    """One forward of no image, or of one blank image, without gradients, in eval mode, on the model's device and dtype.

    A batch of no images has all shapes and calls all modules, and costs next to nothing. Where something cannot do with
    that, one image is taken: on a CPU first without computing the products, which is what takes time.

    Args:
        model: the model.
        size: of the image.
        run: in the model's place.
        again: called before each further attempt, to forget what was seen in the one before.

    Returns what the model, or ``run``, gave.

    Raises:
        UnsupportedModelError: the model does not take an image of its own size.
    """
    reference = next((p for p in model.parameters() if p.is_floating_point()), None)
    with eval_mode(model), torch.no_grad():
        image = torch.zeros(1, *size, dtype=reference.dtype, device=reference.device)
        cheap = [(image, _without_products)] if image.device.type == "cpu" else []
        for few, products in ((image[:0], nullcontext), *cheap):
            try:
                with products():
                    return (run or model)(few)
            except Exception:  # of whatever class: the one image decides
                if again is not None:
                    again()
        try:
            return (run or model)(image)
        except VpeftError:
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"a dry forward of {type(model).__name__} on a {'x'.join(map(str, size))} image failed: {error}"
            ) from error


def _without_products() -> AbstractContextManager:
    from .hollow import Hollow  # of torch's parts that nothing else needs

    return Hollow()


def prove_alive(model: nn.Module, places: Iterable[ModuleRef], size: tuple[int, ...]) -> None:
    """One dry forward in which every given module must be called.

    Raises:
        UnsupportedModelError: names the modules whose forward is never called, so that a hook there does nothing.
    """
    dead = [p.path for p in never_called(model, places, size)]
    if dead:
        raise UnsupportedModelError(
            f"hooks at {', '.join(dead[:4])} would do nothing: {type(model).__name__} never calls "
            f"{'this module' if len(dead) == 1 else 'these modules'}"
        )


def never_called(
    model: nn.Module,
    places: Iterable[ModuleRef],
    size: tuple[int, int, int],
    run: Callable[[Tensor], Any] | None = None,
) -> list[ModuleRef]:
    """Those of the given modules that one dry forward of the model (or ``run``, of a part of it) does not call."""
    calls: dict[int, int] = {}
    unique = {id(p.module): p for p in places}

    def count(module, args, output):
        calls[id(module)] = calls.get(id(module), 0) + 1

    handles = [p.module.register_forward_hook(count) for p in unique.values()]
    try:
        dry_forward(model, size, run)
    finally:
        for handle in handles:
            handle.remove()
    return [p for key, p in unique.items() if key not in calls]
