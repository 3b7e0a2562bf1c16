"""Heads: what trains beside a method."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ..backbone.modules import head_places
from ..errors import MethodError
from .summary import _some


def _check_heads(model: nn.Module, heads: Mapping[str, nn.Module]) -> None:
    inside = {id(module) for module in model.modules()}
    for name, module in heads.items():
        if not isinstance(module, nn.Module):
            raise MethodError(f"heads: '{name}' is no module but {type(module).__name__}")
        if id(module) in inside:
            raise MethodError(f"heads: '{name}' is part of the model; the model's own classifier trains without being named")
        if not name.isidentifier() or hasattr(model, name):
            raise MethodError(f"heads: '{name}' must be letters, digits and underscores, and no name in the model")


def _head_differences(wanted: dict[str, tuple], found: dict[str, tuple]) -> str:
    """What a file's heads have that the model's have not, or in another shape."""
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    both = sorted(wanted.keys() & found.keys())
    parts = [f"{n} is {wanted[n]} in the file, {found[n]} here" for n in both if wanted[n] != found[n]]
    if missing:
        parts.append(f"{_some(missing)} only in the file (give load the modules that were trained: heads=…)")
    if unknown:
        parts.append(f"{_some(unknown)} not in the file")
    return "; ".join(parts)


def _fit_classifier(model: nn.Module, tensors: dict[str, Tensor]) -> Callable[[], None]:
    """Give the model a classifier of as many outputs as in a file, where its own has others; returns what undoes it."""
    wanted = {n: t.shape[0] for n, t in tensors.items() if n.endswith(("bias", "weight"))}
    heads = head_places(model)
    have = {f"{h.path}.{n}": t.shape[0] for h in heads for n, t in h.module.state_dict().items() if n in ("bias", "weight")}
    if not wanted or have == wanted:
        return lambda: None
    return _reset_classifier(model, next(iter(wanted.values())))


def _reset_classifier(model: nn.Module, classes: int) -> Callable[[], None]:
    """timm's ``reset_classifier``; returns a function that puts the former one back."""
    heads = {h.path: h.module for h in head_places(model)} or {
        n: getattr(model, n) for n in ("head", "head_dist") if isinstance(getattr(model, n, None), nn.Identity)
    }
    count = getattr(model, "num_classes", None)

    def put_back() -> None:
        model.reset_classifier(count)
        for path, module in heads.items():
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module)

    like = next(p for p in model.parameters() if p.is_floating_point())
    model.reset_classifier(classes)
    for head in head_places(model):
        head.module.to(device=like.device, dtype=like.dtype)
        head.module.requires_grad_(True)
    return put_back
