"""``model.vpeft``: the attached methods by name, whose classifier the model has, and what ``detach`` has to put back."""

from collections.abc import Callable
from typing import Any

from torch import nn

from ..attached.classifier import Classifier
from ..attached.tree import Tree
from ..backbone.modules import CONTAINER, ModuleRef
from ..interventions.hub import Hub


class Container(nn.Module):
    """The trees of a model's attached methods, as its children.

    Attributes:
        hub: of the model.
        classifier: the model's own, in the model while no method is enabled.
        order: names of the enabled handles, the one last enabled at the end: its classifier is in the model.
        required_grad: which of the model's parameters required a gradient before the first method was attached.
        patched: attentions that were set to call their own qkv module.
    """

    def __init__(self, model: nn.Module, hub: Hub):
        super().__init__()
        self.hub = hub
        self.classifier = Classifier.of(model)
        self.order: list[str] = []
        self.required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self.patched: list[ModuleRef] = []

    @property
    def trees(self) -> dict[str, Tree]:
        """The attached methods' trees by name."""
        return dict(self.named_children())

    def shown(self) -> Classifier:
        """The classifier that belongs into the model now."""
        return self._modules[self.order[-1]].classifier if self.order else self.classifier

    def show(self) -> None:
        """Put the classifier of the handle that was enabled last into the model, or the model's own."""
        self.order = [name for name in self.order if name in self._modules and self._modules[name].enabled]
        self.shown().put_into(self.hub.model)

    def reset_classifier(self, *args: Any, **kwargs: Any) -> None:
        """timm's ``reset_classifier``: a fresh classifier for the enabled handle, or, without one, for the model."""
        model = self.hub.model
        type(model).reset_classifier(model, *args, **kwargs)
        made = Classifier.of(model)
        if not self.order:
            self.classifier = made
            return
        tree: Tree = self._modules[self.order[-1]]
        for old in tree.classifier.modules.values():
            self.hub.forget(old)
        tree.method.follow_classifier(tree, made.heads)
        tree.classifier = Classifier.of(model)
        tree.sites.heads = tree.classifier.heads

    def _apply(self, fn: Callable, recurse: bool = True) -> "Container":
        inside = set(self.hub.model.modules())
        for classifier in (self.classifier, *(tree.classifier for tree in self.children())):
            for module in classifier.modules.values():
                if module not in inside:  # it waits for its turn, and moves along
                    module._apply(fn, recurse)
        return super()._apply(fn, recurse)


def container_of(model: nn.Module) -> Container | None:
    """What holds a model's attached methods, or None where nothing is attached."""
    return getattr(model, CONTAINER, None)


def remove(model: nn.Module, name: str) -> None:
    """Take one method off a model, whatever state it is in; with the last one, everything that came with the first."""
    container = container_of(model)
    for intervention in container._modules[name].interventions:
        intervention.uninstall()
    container.hub.remove(name)
    container.hub.acting = tuple(n for n in container.hub.acting if n != name)
    del container._modules[name]
    container.show()
    needed = {id(p.module) for tree in container.children() for i in tree.interventions for p in i.calls_needed()}
    for place in [p for p in container.patched if id(p.module) not in needed]:
        place.module.qkv_bias_separate = False
        container.patched.remove(place)
    if not container._modules:
        container.hub.uninstall()
        vars(model).pop("reset_classifier", None)
        for n, parameter in model.named_parameters():
            parameter.requires_grad_(container.required_grad.get(n, True))
        delattr(model, CONTAINER)
