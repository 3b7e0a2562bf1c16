"""``to_peft``: an attached method as an adapter of huggingface peft."""

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import MethodError, UnsupportedModelError, WriteError
from ...files import as_path, write_tensors, write_text, writing_folder
from ...methods.kron import KronALinear, lokr_shape
from ...methods.lora import LoRA, LoraLinear
from ...methods.lora_variants import DoraLinear
from ...numerics import wide
from ...tuning.handle import Handle
from .files import CONFIG, LOKR, LORA, PREFIX, TENSORS


def to_peft(handle: Handle, folder: str | Path, *, head: bool = True, overwrite: bool = False) -> Path:
    """Write a method as an adapter that ``peft.PeftModel.from_pretrained(model, folder)`` loads, with equal outputs.

    Low-rank updates (LoRA, rsLoRA and relatives that add a product of two factors) and DoRA become peft's LoRA, KronA
    becomes LoKr. Slots of a fused linear have no name in peft: factors of q, k and v become one block-diagonal update of
    the whole linear, which computes the same, and would go on training as one of its rank.

    Args:
        handle: of the method; enabled or not, not merged.
        folder: is made; ``adapter_config.json`` and ``adapter_model.safetensors`` are written into it.
        head: write the classifier too (peft's ``modules_to_save``).
        overwrite: replace an adapter that is there.

    Raises:
        MethodError: merged, another kind of method, or heads that peft cannot hold.
        UnsupportedModelError: an attention that reads the weight of its qkv and never calls it: peft would not act.
        WriteError: there is an adapter, or no folder can be there.
    """
    folder = as_path(folder)
    for name in (CONFIG, TENSORS):
        if (folder / name).exists() and not overwrite:
            raise WriteError(f"{folder / name} is there already; overwrite=True replaces it")
    if handle.merged:
        raise MethodError(f"'{handle.name}' is merged into the weights; unmerge() first")
    parts = _parts(handle)
    config, tensors = (_lokr if isinstance(parts[0], KronALinear) else _lora)(handle, parts)
    tensors = {f"{PREFIX}{n}": t for n, t in tensors.items()}
    modules: list[str] = []
    if head:
        modules = _head(handle, tensors)
    config = {
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": [p.site.path for p in parts],
        "modules_to_save": modules or None,
        **config,
    }
    with _folder(folder) as place:
        write_tensors(place / TENSORS, tensors, {"format": "pt"})
        write_text(place / CONFIG, json.dumps(config, indent=2) + "\n")
    return folder


@contextmanager
def _folder(folder: Path) -> Iterator[Path]:
    """Where to write: a new folder appears with both files in it; in one that is there, each file appears whole."""
    if folder.is_dir() and any(folder.iterdir()):
        yield folder
        return
    with writing_folder(folder) as place:
        yield place


def _parts(handle: Handle) -> list[Any]:
    """What acts, each at a linear of its own.

    Raises:
        MethodError, UnsupportedModelError: see ``to_peft``.
    """
    parts = [i for i in handle.root.interventions if i.hooked() or i.owned_names()]
    low = all(isinstance(i, LoraLinear) and (i.plain or type(i) is DoraLinear) for i in parts)
    if not parts or not (low or all(isinstance(i, KronALinear) for i in parts)):
        strange = next((type(i).__name__ for i in parts if not isinstance(i, LoraLinear | KronALinear)), None)
        raise MethodError(
            f"'{handle.name}': peft has no like of {handle.method.name}{f' ({strange})' if strange else ''}; what adds a "
            "product of two factors (LoRA), DoRA and Kronecker products can be exchanged"
        )
    if len({type(i) is DoraLinear for i in parts}) > 1 or len({i.site.path for i in parts}) < len(parts):
        raise MethodError(f"'{handle.name}': peft has one kind of update for all linears, and one update for each")
    for part in parts:
        if part.site.bias_outside is not None:
            raise UnsupportedModelError(
                f"{part.site.bias_outside.path} reads the weight of {part.site.path} and never calls it, so that peft's "
                "update there would not act; choose targets among proj, fc1 and fc2, or merge and save the model"
            )
    return parts


# ---- LoRA ----


def _lora(handle: Handle, parts: list[LoraLinear]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    method, dora = handle.method, type(parts[0]) is DoraLinear
    stabilised = isinstance(method, LoRA) and method.stabilised
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, float]] = {}
    for part in parts:
        path = part.site.path
        a, b = (f.detach() for f in part.factors())
        tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        sizes[path] = (len(a), part.scale * (len(a) ** 0.5 if stabilised else len(a)))
        if dora:
            tensors[f"{path}.lora_magnitude_vector"] = _lengths(part)
    (rank, alpha), _ = Counter(sizes.values()).most_common(1)[0]
    dropout = getattr(method, "dropout", 0.0) or 0.0
    if dropout and getattr(method, "dropout_on", "input") != "input":
        warnings.warn("peft has no dropout on the bottleneck: lora_dropout=0 is written; outputs are the same", stacklevel=3)
        dropout = 0.0
    config = {
        "peft_type": LORA,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": stabilised,
        "use_dora": dora,
        "init_lora_weights": True,
        "rank_pattern": {p: r for p, (r, _) in sizes.items() if r != rank},
        "alpha_pattern": {p: _number(a) for p, (_, a) in sizes.items() if a != alpha},
    }
    return config, tensors


def _lengths(part: DoraLinear) -> Tensor:
    """DoRA's m of the whole linear: the rows' own lengths where no slot covers them, which leaves them as they are."""
    weight = part.site.module.weight
    m = torch.linalg.vector_norm(wide(weight), dim=1).to(weight.dtype)
    for (start, stop), slot in part.parts():
        m[start:stop] = slot.m.detach()
    return m


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


# ---- LoKr ----


def _lokr(handle: Handle, parts: list[KronALinear]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    factor = _factor(parts)
    tensors: dict[str, Tensor] = {}
    if factor is None:
        warnings.warn(
            f"'{handle.name}': peft's LoKr has whole linears, whose factors' sizes follow one decompose_factor; with "
            "others the whole updates are written (decompose_factor=1), as large as the weights. To exchange the factors "
            "themselves, train with factor=-1 and without q, k, v of a fused linear (qkv is whole)",
            stacklevel=3,
        )
    for part in parts:
        path = part.site.path
        if factor is None:
            w2 = (part.delta() / part.scale if part.scale else part.delta()).to(part.site.module.weight.dtype)
            w1 = w2.new_ones(1, 1)
        else:
            w1, w2 = (f.detach() for f in part.pair(next(iter(part.rows))))
        tensors |= {f"{path}.lokr_w1": w1, f"{path}.lokr_w2": w2}
    rank = max(max(t.shape) for n, t in tensors.items() if n.endswith("w2"))  # below half of it peft would split w2 again
    config = {
        "peft_type": LOKR,
        "r": rank,
        "alpha": _number(parts[0].scale * rank),
        "rank_dropout": 0.0,
        "module_dropout": 0.0,
        "use_effective_conv2d": False,
        "decompose_both": False,
        "decompose_factor": 1 if factor is None else factor,
        "init_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    return config, tensors


def _factor(parts: list[KronALinear]) -> int | None:
    """The ``decompose_factor`` under which peft's factors are of these sizes; None where there is none."""
    if any(part.site.is_part for part in parts):
        return None
    shapes = {(p.site.out_features, p.site.in_features, tuple(p.pair(next(iter(p.rows)))[0].shape)) for p in parts}
    for factor in (-1, *range(1, max(max(s[2]) for s in shapes) + 1)):
        if all(lokr_shape(out, width, factor) == shape for out, width, shape in shapes):
            return factor
    return None


# ---- the head ----


def _head(handle: Handle, tensors: dict[str, Tensor]) -> list[str]:
    """Put the classifier among the tensors; the names of its modules."""
    classifier = handle.root.classifier
    outside = ", ".join(place.path for place in handle.heads if place.path not in classifier.modules)
    if outside:
        raise MethodError(f"peft cannot hold heads outside the model ({outside}); head=False leaves all heads out")
    modules = [place.path for place in classifier.heads]
    for path in modules:
        twins = [n for n, _ in handle.model.named_modules() if n.endswith(path)]
        if twins != [path]:
            raise MethodError(f"peft finds modules by the end of their names, which {', '.join(twins)} have in common")
    tensors |= {f"{PREFIX}{n}": t.detach() for n, t in handle.head_state_dict().items()}
    return modules
