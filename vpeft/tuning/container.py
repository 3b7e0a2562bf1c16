"""``model.vpeft``: the attached methods by name, whose classifier the model has, and what ``detach`` has to put back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..attached.classifier import Classifier
from ..attached.tree import Tree
from ..backbone.modules import CONTAINER, ModuleRef
from ..errors import MethodError
from ..interventions.hub import Hub
from ..shards import reshard


class Container(nn.Module):
    """The trees of a model's attached methods, as its children.

    Attributes:
        hub: of the model.
        own_classifier: the model's own, in the model while no method is enabled.
        enabled_order: names of the enabled handles, the one last enabled at the end: its classifier is in the model.
        required_grad: which of the model's parameters required a gradient before the first method was attached.
        shown: whose classifier is in the model; None for the model's own.
        own_reset: a function that a user had put in the place of timm's ``reset_classifier``.
        patched: attentions that were set to call their own qkv module.
    """

    hub: Hub
    own_classifier: Classifier
    enabled_order: list[str]
    required_grad: dict[str, bool]
    patched: list[ModuleRef]
    shown: str | None
    own_reset: Callable | None

    def __init__(self, hub: Hub, classifier: Classifier, required_grad: dict[str, bool]):
        super().__init__()
        self.hub, self.own_classifier, self.required_grad = hub, classifier, required_grad
        self.enabled_order, self.patched = [], []
        self.shown, self.own_reset = None, vars(hub.model).get("reset_classifier")

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
        self.adopt_classifier()
        self.enabled_order = [name for name in self.enabled_order if name in self._modules and self._modules[name].enabled]
        self.current_classifier().put_into(self.hub.model)
        self.shown = self.enabled_order[-1] if self.enabled_order else None

    def adopt_classifier(self) -> None:
        """A classifier that a user has put into the model by hand belongs to whose was there before."""
        tree, now = self._modules.get(self.shown), Classifier.of(self.hub.model)
        known = self.own_classifier if tree is None else tree.classifier
        if not now.modules or now.is_same(known):
            return
        if tree is None:
            self.own_classifier = now
        else:
            tree.classifier, tree.sites.heads = now, now.heads

    def reset_classifier(self, *args: Any, **kwargs: Any) -> None:
        """timm's ``reset_classifier``: a fresh classifier for the enabled handle, or, without one, for the model.

        Raises:
            MethodError: the method cannot follow; another pooling is asked for, which all methods share with the model; or
            the model is in shards.
        """
        model, before = self.hub.model, Classifier.of(self.hub.model)
        if reshard(model):
            raise MethodError("the model is in shards, a fresh classifier would not be: reset_classifier before fully_shard")
        pool, has = kwargs.get("global_pool", args[1] if len(args) > 1 else None), getattr(model, "global_pool", None)
        if pool is not None and pool != has:
            raise MethodError(
                f"the model pools with {has!r}, with methods attached it cannot change to {pool!r}: "
                f"call reset_classifier(..., {pool!r}) before attach"
            )
        if self.own_reset is None:
            type(model).reset_classifier(model, *args, **kwargs)
        else:
            self.own_reset(*args, **kwargs)
        made = Classifier.of(model)
        if not self.enabled_order:
            self.own_classifier = made
            return
        tree: Tree = self._modules[self.enabled_order[-1]]
        try:
            for module in made.modules.values():
                module.requires_grad_(tree.method.trains_head)
            tree.method.follow_classifier(tree, made.heads)
        except BaseException:
            before.put_into(model)
            raise
        for old in before.modules.values():
            self.hub.forget(old)
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
    reshard(model)
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
        if container.own_reset is not None:
            model.reset_classifier = container.own_reset
        for n, parameter in model.named_parameters():
            parameter.requires_grad_(container.required_grad.get(n, True))
        delattr(model, CONTAINER)
