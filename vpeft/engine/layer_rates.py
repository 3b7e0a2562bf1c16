"""Learning rates of their own for layers of the model, where a method trains the model's tensors.

``optim.layer_decay`` multiplies the rate once for each layer below the classifier, as timm groups them; ``optim.lr_scales``
multiplies it for what lies under a path. The schedule's first and lowest rates are multiplied too (timm's ``lr_scale``).

Rates that fall by a factor from layer to layer: ULMFiT, ACL 2018, arXiv 1801.06146; under this name, for transformers:
ELECTRA, ICLR 2020, arXiv 2003.10555; for ViTs: BEiT, ICLR 2022, arXiv 2106.08254.
"""

from typing import Any

from omegaconf import DictConfig

from ..backbone.layers import layer_numbers
from ..errors import ConfigError, UnsupportedModelError, did_you_mean, some
from ..tuning.handle import Handle


def scales_of(config: DictConfig, handle: Handle) -> dict[str, float]:
    """Factors of ``optim.lr`` for each tensor that the method trains; empty where none were asked for.

    Raises:
        ConfigError: the method trains other tensors than the model's, timm groups none of this model's, or a path under
            which nothing is trained.
    """
    decay, paths = config.optim.layer_decay, dict(config.optim.lr_scales)
    if decay == 1 and not paths:
        return {}
    trained = [name for name, _ in handle.named_parameters()]
    key = "optim.layer_decay" if decay != 1 else "optim.lr_scales"
    own = {name for name, _ in handle.sites.parameters()}
    foreign = [name for name in trained if name not in own]
    if foreign or not trained:
        what = f"tensors of its own ({some(foreign)})" if foreign else "the head alone"
        raise ConfigError(
            f"{key}: rates by layer are for methods that train the model's tensors; {handle.method.name} trains {what}; "
            "leave it out"
        )
    scales = dict.fromkeys(trained, 1.0)
    if decay != 1:
        try:
            layers = layer_numbers(handle.model)
        except UnsupportedModelError as error:
            raise ConfigError(f"optim.layer_decay: {error}; give optim.lr_scales by path") from error
        top = max(layers.values())
        scales = {name: decay ** (top - layers[name]) for name in trained}
    found = {name: max((p for p in paths if _under(name, p)), key=len, default=None) for name in trained}
    unused = [p for p in paths if not any(_under(name, p) for name in trained)]
    if unused:
        raise ConfigError(_unused(unused[0], trained, handle))
    return {name: s * (1.0 if found[name] is None else paths[found[name]]) for name, s in scales.items()}


def _under(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def _unused(path: str, trained: list[str], handle: Handle) -> str:
    if any(_under(name, path) for name, _ in handle.head_parameters()):
        return f"optim.lr_scales.{path}: the head has a rate of its own; give optim.head_lr"
    known = {".".join(parts[:n]) for parts in (name.split(".") for name in trained) for n in range(1, len(parts) + 1)}
    return f"optim.lr_scales.{path}: {handle.method.name} trains nothing under this path{did_you_mean(path, known)}"


def by_layer(config: DictConfig, handle: Handle, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A handle's parameter groups, cut where tensors have other rates; what is not decayed stays so, and heads stay.

    Args:
        config: the experiment.
        handle: of the method.
        groups: of ``Handle.param_groups``.

    Raises:
        ConfigError: see ``scales_of``.
    """
    scales = scales_of(config, handle)
    if not scales:
        return groups
    names = {id(p): name for name, p in handle.named_parameters()}
    found = []
    for group in groups:
        if group["name"] == "head":
            found.append(group)
            continue
        cut: dict[float, list[Any]] = {}
        for p in group["params"]:
            cut.setdefault(scales[names[id(p)]], []).append(p)
        found += [{**group, "params": cut[s], "lr_scale": s} for s in sorted(cut, reverse=True)]
    return found


def rate_lines(handle: Handle, groups: list[dict[str, Any]]) -> list[str]:
    """A line for each rate of groups that were cut: the rate, how many tensors and which; nothing where none were."""
    if not any("lr_scale" in group for group in groups):
        return []
    names = {id(p): name for name, p in [*handle.named_parameters(), *handle.head_parameters()]}
    rates: dict[float, list[str]] = {}
    for group in groups:
        rates.setdefault(group["lr"] * group.get("lr_scale", 1.0), []).extend(names[id(p)] for p in group["params"])
    lines = []
    for rate, here in sorted(rates.items(), reverse=True):
        places = dict.fromkeys(_place(name) for name in here)
        lines.append(f"rate {rate:.4g}: {len(here)} tensors of {', '.join(places)}")
    return lines


def _place(name: str) -> str:
    """The block of a tensor, or the module of the model's first level."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=0)
    return ".".join(parts[: last + 1])
