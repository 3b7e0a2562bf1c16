"""A model's classifier as something that can be exchanged: every attached method has one of its own."""

import copy
from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor, nn

from ..backbone.modules import ModuleRef, classifier_modules


@dataclass
class Classifier:
    """The modules that stand where timm has a model's classifier, and the model's number of classes.

    Attributes:
        modules: by path; an Identity where the model has no classifier (``num_classes=0``).
        num_classes: the model's attribute of this name.
    """

    modules: dict[str, nn.Module]
    num_classes: int | None

    @classmethod
    def of(cls, model: nn.Module) -> "Classifier":
        """The one that a model has now."""
        found = {place.path: place.module for place in classifier_modules(model)}
        return cls(found, getattr(model, "num_classes", None))

    def put_into(self, model: nn.Module) -> None:
        """Make it the model's; nothing is computed or copied."""
        for path, module in self.modules.items():
            parent, _, leaf = path.rpartition(".")
            owner = model.get_submodule(parent)
            if owner._modules.get(leaf) is not module:
                setattr(owner, leaf, module)
            if hasattr(owner, "num_classes"):
                owner.num_classes = self.num_classes
        if hasattr(model, "num_classes"):
            model.num_classes = self.num_classes

    def is_same(self, other: "Classifier") -> bool:
        """The very same modules at the same places."""
        paths = self.modules.keys() == other.modules.keys()
        return paths and all(module is other.modules[path] for path, module in self.modules.items())

    def twin(self) -> "Classifier":
        """A copy with tensors of its own and the same hooks."""
        return Classifier({path: _copied(module) for path, module in self.modules.items()}, self.num_classes)

    @property
    def heads(self) -> list[ModuleRef]:
        """The modules that have tensors."""
        return [ModuleRef(path, m) for path, m in self.modules.items() if any(True for _ in m.parameters())]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of its tensors, by their names in the model."""
        return {name: tuple(t.shape) for name, t in self.tensors().items()}

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, by their names in the model."""
        return {f"{head.path}.{n}": t for head in self.heads for n, t in head.module.state_dict().items()}


def _copied(module: nn.Module) -> nn.Module:
    # Hooks that somebody put there stay theirs: what they are bound to is not copied.
    tables = (module._forward_hooks, module._forward_pre_hooks)
    return copy.deepcopy(module, {id(table): OrderedDict(table) for table in tables})


def fresh_classifier(model: nn.Module, classes: int) -> Classifier:
    """timm's fresh classifier of so many classes, like the model in type and device; the model keeps it."""
    like = next(p for p in model.parameters() if p.is_floating_point())
    type(model).reset_classifier(model, classes)
    made = Classifier.of(model)
    for module in made.modules.values():
        module.to(device=like.device, dtype=like.dtype)
        module.requires_grad_(True)
    return made
