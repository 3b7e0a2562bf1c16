"""``from_peft``: an adapter of huggingface peft as an attached method."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...attached.classifier import WantedClassifier
from ...backbone.modules import SLOTS, LinearSite, classifier_modules, head_places
from ...backbone.sites import Sites
from ...errors import CheckpointError, UnsupportedModelError, some
from ...files import naming
from ...methods.base import Method
from ...methods.kron import KronA, lokr_shape
from ...methods.lora import SCALINGS, LoRA
from ...methods.lora_variants import DoRA
from ...tuning.attaching import attach_method, check_arguments
from ...tuning.handle import Handle
from .files import LORA, PeftAdapter, read

Found = dict[str, tuple[int, LinearSite]]


def from_peft(model: nn.Module, folder: str | Path, *, name: str | None = None, head: bool = True) -> Handle:
    """Attach what an adapter of huggingface peft holds; the model then computes what peft's does.

    peft need not be there. An update of the classifier itself (as with ``target_modules="all-linear"``) is put into the
    handle's classifier. Where linears of a block differ in rank, the smaller ones are filled up without effect; factors of
    LoKr that are products themselves are multiplied.

    Args:
        model: a fresh timm model with the weights that the adapter was trained on, which its files do not say.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: for the handle; the method's where None.
        head: also take the classifier that was trained with it.

    Raises:
        CheckpointError: missing or damaged files, pickles, something in them without a like here, or an attention that never
            calls the adapted linear, so that peft's update did not act; names it. The model is then as it was.
        UnsupportedModelError: a wrapper around a model.
    """
    check_arguments(model, name, None)
    adapter = read(folder)
    with naming(adapter.folder):
        sites = Sites(model)
        found, heads = _located(sites, model, adapter)
        method = (_lora if adapter.kind == LORA else _lokr)(sites, found, adapter)
        saved = _saved(model, adapter, head)
        wanted = _wanted(saved) if saved else None

        def fill(handle: Handle) -> None:
            own = handle.root.head_tensors()
            if saved and saved.keys() != own.keys():
                raise CheckpointError(f"its classifier has {some(sorted(saved))}, the model's {some(sorted(own))}")
            values = {n: t.detach().clone() for n, t in handle.state_dict().items()}
            (_fill_lora if adapter.kind == LORA else _fill_lokr)(values, found, adapter, method)
            handle.load_state_dict(values | {n: t.clone() for n, t in own.items()} | saved)
            for path in heads if head else ():
                _update_head(handle, path, adapter)

        return attach_method(model, method, name, {}, wanted, fill)


def _located(sites: Sites, model: nn.Module, adapter: PeftAdapter) -> tuple[Found, list[str]]:
    """The blocks' linears that are adapted, and the classifiers that are.

    Raises:
        CheckpointError: something else is adapted, a linear of another size, or one that is never called.
    """
    known: Found = {}
    for block in sites.blocks:
        for slot in SLOTS:
            try:
                linears = block.linears(slot)
            except UnsupportedModelError:
                continue
            known |= {site.path: (block.index, site) for site in linears if not site.is_part}
    classifiers = {place.path: place.module for place in head_places(model) if isinstance(place.module, nn.Linear)}
    strange = sorted(adapter.linears.keys() - known.keys() - classifiers.keys())
    if strange:
        raise CheckpointError(
            f"it adapts {some(strange)}; only linears of blocks ({', '.join(SLOTS)}) and the classifier can be adapted here"
        )
    found = {path: known[path] for path in adapter.linears if path in known}
    if not found:
        raise CheckpointError("it adapts no linear of a block")
    modules = {path: site.module for path, (_, site) in found.items()} | classifiers
    for path in adapter.linears:
        size, own = _size(adapter, path), tuple(modules[path].weight.shape)
        if size != own:
            raise CheckpointError(f"its update of {path} is for a weight of {size}, which is {own} here")
    for path, (_, site) in found.items():
        if site.bias_outside is not None:
            raise CheckpointError(f"{site.bias_outside.path} never calls {path}: peft's update there did not act")
    return found, [path for path in adapter.linears if path in classifiers]


def _size(adapter: PeftAdapter, path: str) -> tuple[int, int]:
    if adapter.kind == LORA:
        return len(adapter.linears[path]["b"]), adapter.linears[path]["a"].shape[1]
    w1, w2 = _kron(adapter, path)
    return len(w1) * len(w2), w1.shape[1] * w2.shape[1]


def _slots(found: Found) -> list[str]:
    return sorted({site.slot for _, site in found.values()}, key=SLOTS.index)


# ---- LoRA ----


def _lora(sites: Sites, found: Found, adapter: PeftAdapter) -> Method:
    config = adapter.config
    options: dict[str, Any] = {"targets": _slots(found), "dropout": float(config.get("lora_dropout") or 0)}
    ranks = [0] * len(sites.blocks)
    for path, (block, _) in found.items():
        ranks[block] = max(ranks[block], adapter.size(path))
    for block in sites.blocks:  # a product of higher rank than a linear has is one of that rank
        linears = [s for slot in options["targets"] for s in block.linears(slot)] if ranks[block.index] else []
        ranks[block.index] = min([ranks[block.index], *(min(s.module.weight.shape) for s in linears)])
    options["rank"] = ranks[0] if len(set(ranks)) == 1 else ranks
    values = {(adapter.size(p), adapter.alpha(p)) for p in found}
    if len(values) == 1 and set(ranks) <= {0, next(iter(values))[0]}:
        options |= {"alpha": float(next(iter(values))[1]), "scaling": SCALINGS[bool(config.get("use_rslora"))]}
    else:
        scales = {adapter.scale(p) for p in found}
        options["scale"] = scales.pop() if len(scales) == 1 else 1.0
    return (DoRA if config.get("use_dora") else LoRA)(**options)


def _fill_lora(values: dict[str, Tensor], found: Found, adapter: PeftAdapter, method: LoRA) -> None:
    """Put the factors into a fresh handle's tensors, whose updates are zero."""
    for path in found:
        tensors, a, b = adapter.linears[path], values[f"{path}.lora.a"], values[f"{path}.lora.b"]
        more = adapter.scale(path) / method.scale_for(len(a)) if method.scale is not None else 1.0
        down, up = _fitting(tensors["a"], tensors["b"], len(a))
        a[: len(down)] = down.to(a)
        b[:, : len(down)] = (up if more == 1 else up.double() * more).to(b)
        if "m" in tensors:
            values[f"{path}.lora.m"] = tensors["m"].flatten()


def _fitting(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two factors with the same product, of at most this rank, which is the smaller side's where it is less than theirs."""
    if len(a) <= rank:
        return a, b
    product = b.double() @ a.double()
    one = torch.eye(min(product.shape), dtype=product.dtype)
    return (one, product) if product.shape[1] <= product.shape[0] else (product, one)


# ---- LoKr ----


def _kron(adapter: PeftAdapter, path: str) -> tuple[Tensor, Tensor]:
    t = adapter.linears[path]
    w1, w2 = (t[w] if w in t else t[f"{w}_a"].double() @ t[f"{w}_b"].double() for w in ("w1", "w2"))
    return w1, w2


def _lokr(sites: Sites, found: Found, adapter: PeftAdapter) -> Method:
    for key in ("rank_dropout", "module_dropout"):
        if adapter.config.get(key):
            warnings.warn(f"{key} of the adapter acts in training alone, and has no like here: left out", stacklevel=4)
    scales = {adapter.scale(p) for p in found}
    blocks = sorted({block for block, _ in found.values()})
    options: dict[str, Any] = {"targets": _slots(found), "scale": scales.pop() if len(scales) == 1 else 1.0}
    options["blocks"] = None if len(blocks) == len(sites.blocks) else blocks
    shapes = {path: tuple(_kron(adapter, path)[0].shape) for path in found}
    factor = adapter.config.get("decompose_factor", -1)
    if all(lokr_shape(*_size(adapter, p), factor) == shape for p, shape in shapes.items()):
        return KronA(factor=factor, **options)
    if len(set(shapes.values())) > 1:
        raise CheckpointError(f"its factors have sizes that decompose_factor={factor} does not give")
    return KronA(shape=list(next(iter(shapes.values()))), **options)


def _fill_lokr(values: dict[str, Tensor], found: Found, adapter: PeftAdapter, method: KronA) -> None:
    for path in found:
        w1, w2 = _kron(adapter, path)
        more = adapter.scale(path) / method.scale if method.scale else 1.0
        values[f"{path}.krona.a"] = w1.to(values[f"{path}.krona.a"])
        values[f"{path}.krona.b"] = (w2 if more == 1 else w2.double() * more).to(values[f"{path}.krona.b"])


# ---- the head ----


def _saved(model: nn.Module, adapter: PeftAdapter, head: bool) -> dict[str, Tensor]:
    """The tensors of the classifier.

    Raises:
        CheckpointError: others were trained too.
    """
    paths = tuple(f"{place.path}." for place in classifier_modules(model))
    strange = sorted(n for n in adapter.saved if not n.startswith(paths))
    if strange:
        raise CheckpointError(f"it holds {some(strange)} too; of modules trained whole only the classifier can be had here")
    return dict(adapter.saved) if head else {}


def _wanted(saved: dict[str, Tensor]) -> WantedClassifier:
    shapes = {n: tuple(t.shape) for n, t in saved.items()}
    classes = {shape[0] for shape in shapes.values() if shape}
    return WantedClassifier(shapes, classes.pop() if len(classes) == 1 else None)


@torch.no_grad()
def _update_head(handle: Handle, path: str, adapter: PeftAdapter) -> None:
    """The update of a classifier, put into its weight."""
    module = next(place.module for place in handle.heads if place.path == path)
    weight, tensors = (
        module.weight.double(),
        {n: t.double().to(module.weight.device) for n, t in adapter.linears[path].items()},
    )
    if adapter.kind == LORA:
        updated = weight + adapter.scale(path) * (tensors["b"] @ tensors["a"])
    else:
        w1, w2 = (t.to(weight) for t in _kron(adapter, path))
        updated = weight + adapter.scale(path) * torch.kron(w1, w2)
    if "m" in tensors:
        updated *= tensors["m"].view(-1, 1) / torch.linalg.vector_norm(updated, dim=1, keepdim=True)
    module.weight.copy_(updated)
