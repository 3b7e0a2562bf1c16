"""A model's classifier as something that can be exchanged: every attached method has one of its own."""

import copy
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..backbone.modules import ModuleRef, classifier_modules, outputs_of


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

    def seen_by(self, model: nn.Module) -> nn.Module:
        """The model as if this were its classifier: a second object that shares all else; the model is not touched."""
        seen = _twin(model)
        for path, module in self.modules.items():
            *way, leaf = path.split(".")
            owner = seen
            for part in way:
                owner._modules[part] = _twin(owner._modules[part])
                owner = owner._modules[part]
            owner._modules[leaf] = module
            if hasattr(owner, "num_classes"):
                owner.num_classes = self.num_classes
        if hasattr(seen, "num_classes"):
            seen.num_classes = self.num_classes
        return seen

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

    @property
    def outputs(self) -> int | None:
        """How many numbers it gives of an image, where that can be read; None where not, or where it has no tensors."""
        return next((outputs_of(head.module) for head in self.heads), None)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of its tensors, by their names in the model."""
        return {name: tuple(t.shape) for name, t in self.tensors().items()}

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, by their names in the model."""
        return {f"{head.path}.{n}": t for head in self.heads for n, t in head.module.state_dict().items()}


@dataclass(frozen=True)
class WantedClassifier:
    """What a file's classifier is like.

    Attributes:
        shapes: of its tensors, by their names in the model; none of a model without a classifier.
        classes: timm's number of classes of it; None where that is not known.
    """

    shapes: Mapping[str, tuple[int, ...]]
    classes: int | None


def classifier_like(model: nn.Module, own: Classifier, wanted: WantedClassifier | None) -> Classifier:
    """A copy of the model's own classifier, or timm's fresh one where the wanted one has another number of classes.

    Args:
        model: keeps a fresh classifier.
        own: its own.
        wanted: None for a copy in any case.
    """
    has = own.num_classes if own.outputs is None else own.outputs
    if wanted is None or wanted.classes in (None, has) or own.shapes() == wanted.shapes:
        return own.twin()
    return fresh_classifier(model, wanted.classes)


def _twin(module: nn.Module) -> nn.Module:
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_modules"] = dict(module._modules)
    return twin


def _copied(module: nn.Module) -> nn.Module:
    # Hooks that somebody put there stay theirs: what they are bound to is not copied.
    tables = (module._forward_hooks, module._forward_pre_hooks)
    return copy.deepcopy(module, {id(table): OrderedDict(table) for table in tables})


def fresh_classifier(model: nn.Module, classes: int) -> Classifier:
    """timm's fresh classifier of so many classes, like the model in type and device; the model keeps it."""
    like = next(p for p in model.parameters() if p.is_floating_point())
    with torch.device("meta") if like.is_meta else nullcontext():
        type(model).reset_classifier(model, classes)
    made = Classifier.of(model)
    for module in made.modules.values():
        module.to(device=like.device, dtype=like.dtype)
        module.requires_grad_(True)
    return made
