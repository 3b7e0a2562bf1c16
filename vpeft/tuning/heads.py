"""Modules outside the model that train with a method, and how a file's heads differ from the model's."""

from collections.abc import Mapping

from torch import nn

from ..errors import MethodError, shown, some


def check_heads(model: nn.Module, heads: Mapping[str, nn.Module]) -> None:
    """Refuse what cannot train beside a method under these names.

    Raises:
        MethodError: no mapping, no module, a part of the model or of another head, or a name that the model has.
    """
    if not isinstance(heads, Mapping | nn.ModuleDict):
        raise MethodError(f"heads: expected modules by name, such as {{'decode_head': module}}, got {type(heads).__name__}")
    inside, elsewhere = parts(model) if heads else set(), {}
    for name, module in heads.items():
        if not isinstance(module, nn.Module):
            raise MethodError(f"heads: {shown(name)} is no module but {type(module).__name__}")
        if not isinstance(name, str) or not name.isidentifier() or hasattr(model, name):
            raise MethodError(f"heads: {shown(name)} must be letters, digits and underscores, and no name in the model")
        own = parts(module)
        if own & inside:
            raise MethodError(
                f"heads: '{name}' is or holds a part of the model; the model's own classifier trains without being named"
            )
        if twin := next((elsewhere[i] for i in own if i in elsewhere), None):
            raise MethodError(f"heads: '{name}' and '{twin}' share a part, which would train and be saved twice")
        elsewhere |= dict.fromkeys(own, name)


def parts(module: nn.Module) -> set[int]:
    """The identities of a module, of what it holds and of their parameters."""
    return {id(part) for part in (*module.modules(), *module.parameters())}


def head_differences(wanted: dict[str, tuple], found: dict[str, tuple]) -> str:
    """What a file's heads have that the model's have not, or in another shape."""
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    both = sorted(wanted.keys() & found.keys())
    parts = [f"{n} is {wanted[n]} in the file, {found[n]} here" for n in both if wanted[n] != found[n]]
    if missing:
        parts.append(f"{some(missing)} only in the file (give load the modules that were trained: heads=…)")
    if unknown:
        parts.append(f"{some(unknown)} not in the file")
    hint = "; of a classifier of your own put one like the file's into the model before load, or give head=False"
    return "; ".join(parts) + hint
