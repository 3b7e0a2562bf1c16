"""``model.vpeft``: the attached methods by name, whose classifier the model has, and what ``detach`` has to put back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        own_classifier: the model's own, in the model while no method is enabled.
        enabled_order: names of the enabled handles, the one last enabled at the end: its classifier is in the model.
        required_grad: which of the model's parameters required a gradient before the first method was attached.
        patched: attentions that were set to call their own qkv module.
    """

    hub: Hub
    own_classifier: Classifier
    enabled_order: list[str]
    required_grad: dict[str, bool]
    patched: list[ModuleRef]

    def __init__(self, hub: Hub, classifier: Classifier, required_grad: dict[str, bool]):
        super().__init__()
        self.hub, self.own_classifier, self.required_grad = hub, classifier, required_grad
        self.enabled_order, self.patched = [], []

    @classmethod
    def has_attribute(cls, name: str) -> bool:
        """Whether a name is taken by something else than an attached method."""
        return hasattr(cls, name) or name in cls.__annotations__ or name in vars(nn.Module())

    @property
    def trees(self) -> dict[str, Tree]:
        """The attached methods' trees by name."""
        return dict(self.named_children())

    @contextmanager
    def bring_forward(self, name: str) -> Iterator[None]:
        """Under here the model has an enabled handle's classifier, also where another one was enabled after it."""
        before = list(self.enabled_order)
        self.enabled_order = [n for n in before if n != name] + [name]
        self.put_classifier()
        try:
            yield
        finally:
            self.enabled_order = before
            self.put_classifier()

    def current_classifier(self) -> Classifier:
        """The classifier that belongs into the model now."""
        return self._modules[self.enabled_order[-1]].classifier if self.enabled_order else self.own_classifier

    def put_classifier(self) -> None:
        """Put the classifier of the handle that was enabled last into the model, or the model's own."""
        self.enabled_order = [name for name in self.enabled_order if name in self._modules and self._modules[name].enabled]
        self.current_classifier().put_into(self.hub.model)

    def reset_classifier(self, *args: Any, **kwargs: Any) -> None:
        """timm's ``reset_classifier``: a fresh classifier for the enabled handle, or, without one, for the model."""
        model = self.hub.model
        type(model).reset_classifier(model, *args, **kwargs)
        made = Classifier.of(model)
        if not self.enabled_order:
            self.own_classifier = made
            return
        tree: Tree = self._modules[self.enabled_order[-1]]
        for old in tree.classifier.modules.values():
            self.hub.forget(old)
        tree.method.follow_classifier(tree, made.heads)
        tree.classifier = Classifier.of(model)
        tree.sites.heads = tree.classifier.heads

    def _apply(self, fn: Callable, recurse: bool = True) -> "Container":
        inside = set(self.hub.model.modules())
        for classifier in (self.own_classifier, *(tree.classifier for tree in self.children())):
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
    container.put_classifier()
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
