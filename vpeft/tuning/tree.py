"""What an attached method brought to a model: a tree of modules, under ``model.vpeft``."""

from torch import Tensor, nn

from ..backbone.modules import ModuleRef
from ..backbone.sites import Sites
from ..errors import VpeftError
from ..interventions.base import Intervention
from ..interventions.weights import ExistingTensors
from ..methods.base import Method
from .calibration import Objective

CONTAINER = "vpeft"


class Root(nn.Module):
    """All that one attached method brought to a model: a tree of modules whose names are the method cards' names."""

    def __init__(self, name: str, method: Method, sites: Sites):
        super().__init__()
        self.name, self.method, self.sites = name, method, sites
        self.enabled = True
        self.calibrated = False
        # Modules outside the model that train with it. A plain dict: they are no part of the model's tree.
        self.heads: dict[str, nn.Module] = {}
        # What calibration measures the method by; only while it lasts.
        self.objective: Objective | None = None
        # While merged: what each folded module held before, as (place, tensor's name, value or None).
        self.unmerged: list[tuple[ModuleRef, str, Tensor | None]] | None = None

    def add_at(self, path: str, module: nn.Module) -> None:
        """Put a module at a dotted path, with empty modules on the way."""
        node: nn.Module = self
        *way, leaf = path.split(".")
        for part in way:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = node._modules[part]
        if leaf in node._modules:
            # An earlier path went through here: the new module takes over what already hangs there.
            for name, child in node._modules[leaf].named_children():
                module.add_module(name, child)
        node._modules[leaf] = module

    @property
    def interventions(self) -> list[Intervention]:
        return [m for m in self.modules() if isinstance(m, Intervention)]

    @property
    def existing(self) -> list[ExistingTensors]:
        return [m for m in self.interventions if isinstance(m, ExistingTensors)]

    def forward(self) -> None:
        raise VpeftError("this module holds hooks; call the model itself")


class Container(nn.Module):
    """``model.vpeft``: the attached methods by name, and what ``detach`` has to put back."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        # Attentions that were set to call their own qkv module.
        self.patched: list[ModuleRef] = []


def _remove(model: nn.Module, name: str) -> None:
    """Take one method's hooks, overrides and modules off a model, whatever state it is in."""
    container = getattr(model, CONTAINER)
    for intervention in container._modules[name].interventions:
        intervention.uninstall()
    mine = {id(m) for m in container._modules[name].modules()}
    for module in model.modules():
        for table in (module._forward_hooks, module._forward_pre_hooks):
            for key in [k for k, hook in table.items() if id(getattr(hook, "__self__", None)) in mine]:
                del table[key]
                for flags in ("_forward_hooks_with_kwargs", "_forward_hooks_always_called",
                              "_forward_pre_hooks_with_kwargs"):  # fmt: skip
                    getattr(module, flags).pop(key, None)
        for key in [k for k, v in vars(module).items() if id(getattr(v, "__self__", None)) in mine]:
            delattr(module, key)
    del container._modules[name]
    needed = {id(p.module) for root in container.children() for i in root.interventions for p in i.calls_needed()}
    for place in [p for p in container.patched if id(p.module) not in needed]:
        place.module.qkv_bias_separate = False
        container.patched.remove(place)
    if not container._modules:
        for n, parameter in model.named_parameters():
            parameter.requires_grad_(container.required_grad.get(n, True))
        delattr(model, CONTAINER)
