"""``model.vpeft``: the attached methods by name, whose classifier the model has, and what ``detach`` has to put back."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..attached.classifier import Classifier
from ..attached.tree import Tree
from ..backbone.modules import CONTAINER, ModuleRef, keeps_statistics
from ..errors import MethodError
from ..interventions.hub import Hub
from ..shards import reshard
from .beside import check_together
from .following import check_other_weights, follow_size, follow_weights
from .stepping import warn_unfrozen

# timm's functions that change the model; the container's, of the same names, stand before them.
STANDS_BEFORE = ("reset_classifier", "set_input_size", "prune_intermediate_layers", "load_pretrained")


class Container(nn.Module):
    """The trees of a model's attached methods, as its children.

    Attributes:
        hub: of the model.
        own_classifier: the model's own, in the model while no method is enabled.
        enabled_order: names of the enabled handles, the one last enabled at the end: its classifier is in the model.
        stated: names in the order in which they act at a site, where that was stated; those attached later follow.
        required_grad: which of the model's parameters required a gradient before the first method was attached.
        shown: whose classifier is in the model; None for the model's own.
        users_own: functions that a user had put in the place of timm's, which the container's stand before.
        patched: attentions that were set to call their own qkv module.
        stilled: frozen modules with running statistics, which would be in the model's mode if nothing were attached.
    """

    hub: Hub
    own_classifier: Classifier
    enabled_order: list[str]
    stated: list[str]
    required_grad: dict[str, bool]
    patched: list[ModuleRef]
    shown: str | None
    users_own: dict[str, Callable]
    stilled: set[nn.Module]

    def __init__(self, hub: Hub, classifier: Classifier, required_grad: dict[str, bool]):
        super().__init__()
        self.hub, self.own_classifier, self.required_grad = hub, classifier, required_grad
        self.enabled_order, self.stated, self.patched, self.stilled = [], [], [], set()
        self._mark = torch.ones(1, dtype=torch.uint8, device="cpu")
        self._seen: list[str] | None = None  # the call of ``load_state_dict`` that was seen last
        self.shown, self.users_own = None, {n: vars(hub.model)[n] for n in STANDS_BEFORE if n in vars(hub.model)}

    def install(self) -> None:
        """Stand before timm's functions that change the model, and see weights before they are loaded."""
        model = self.hub.model
        for name in STANDS_BEFORE:
            if callable(getattr(model, name, None)):
                setattr(model, name, getattr(self, name))
        for module in self._loadable():
            module.register_load_state_dict_pre_hook(self._before_load)
        self.training = model.training
        self._still()

    def uninstall(self) -> None:
        """Give the model its functions back."""
        model = self.hub.model
        for name in STANDS_BEFORE:
            vars(model).pop(name, None)
        vars(model).update(self.users_own)
        for module in self.stilled:
            module.training = model.training
        for module in self._loadable():
            hooks = module._load_state_dict_pre_hooks
            for key in [k for k, hook in hooks.items() if getattr(hook.hook, "__self__", None) is self]:
                del hooks[key]

    def train(self, mode: bool = True) -> "Container":
        """Called by torch for each ``model.train(mode)``, after the model's own parts.

        What is frozen includes the running statistics of norms (the convolutions of hybrid models have them): no file
        of a method holds them. Loops that are not vpeft's call ``model.train()`` on everything.
        """
        super().train(mode)
        self._still()
        if mode:
            warn_unfrozen(self.hub.model, self.children())
        return self

    def _still(self) -> None:
        """Evaluation mode for the frozen modules whose buffers a forward in training mode would change."""
        heads = {m for tree in self.children() for h in tree.classifier.modules.values() for m in h.modules()}
        for module in {*self.hub.model.modules()} - {*self.modules()} - heads:
            if module.training and keeps_statistics(module):
                module.training = False
                self.stilled.add(module)

    def _loadable(self) -> list[nn.Module]:
        """The model and its parts, whose own ``load_state_dict`` is seen too; the classifier's belong to handles."""
        heads = tuple(f"{path}." for path in self.own_classifier.modules)
        parts = [module for module, (_, _, path) in self.hub.places.items() if not f"{path}.".startswith(heads)]
        return [self.hub.model, *parts]

    @classmethod
    def has_attribute(cls, name: str) -> bool:
        """Whether a name is taken by something else than an attached method."""
        return hasattr(cls, name) or name in cls.__annotations__ or name in vars(nn.Module())

    @property
    def trees(self) -> dict[str, Tree]:
        """The attached methods' trees by name."""
        return dict(self.named_children())

    @property
    def order(self) -> list[str]:
        """Names of all handles in the order in which they act at one site: that of attaching, or as it was stated."""
        return [*self.stated, *(name for name in self._modules if name not in self.stated)]

    def arrange(self, order: list[str]) -> None:
        """Let the handles act in this order at every site."""
        if order != self.order:
            self.hub.arrange(order)
            self.stated = list(order)

    @contextmanager
    def bring_forward(self, name: str) -> Iterator[None]:
        """Under here the model has an enabled handle's classifier, also where another one was enabled after it.

        Raises:
            MethodError: an enabled method acts at another classifier.
        """
        check_together([tree for tree in self.trees.values() if tree.enabled and tree.unmerged is None], name)
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
        self.adopt_classifier(refuse=False)
        self.enabled_order = [name for name in self.enabled_order if name in self._modules and self._modules[name].enabled]
        shown = self.enabled_order[-1] if self.enabled_order else None
        if shown != self.shown:  # the mode was set while another one stood there
            mode = (self.hub.model if shown is None else self._modules[shown]).training
            for module in self.current_classifier().modules.values():
                module.train(mode)
        self.current_classifier().put_into(self.hub.model)
        self.shown = shown

    def adopt_classifier(self, refuse: bool = True) -> None:
        """A classifier that a user has put into the model by hand belongs to whose was there before.

        Args:
            refuse: raise where that cannot be; else it is passed over.

        Raises:
            MethodError: the method acts at the classifier that it found (a label map, more inputs).
        """
        tree, now = self._modules.get(self.shown), Classifier.of(self.hub.model)
        known = self.own_classifier if tree is None else tree.classifier
        if not now.modules or now.is_same(known):
            return
        acted_at = set() if tree is None else {p.module for i in tree.interventions for p in i.hooked()}
        if acted_at & {*known.modules.values(), *now.modules.values()}:
            if refuse:
                raise MethodError(
                    f"'{self.shown}' acts at the classifier itself, and cannot follow one that is set by hand: put the "
                    "former one back, and call model.reset_classifier(n), or detach it first"
                )
            return
        self.hub.changed()
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
        self._timms("reset_classifier", model)(*args, **kwargs)
        made = Classifier.of(model)
        self.hub.changed()
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

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """timm's ``set_input_size``, tried on a copy of the model first.

        Raises:
            MethodError: a method cannot follow.
        """
        follow_size(self.hub.model, self.trees, lambda model: self._timms("set_input_size", model)(*args, **kwargs))

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> None:
        """timm's function takes blocks out of the model.

        Raises:
            MethodError: always; methods act on them.
        """
        raise MethodError(
            f"{', '.join(self.trees)} act on the blocks that prune_intermediate_layers takes away; call it before attach"
        )

    def load_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """timm's ``load_pretrained``, which writes into the weights by itself.

        Raises:
            MethodError: a method depends on the present ones.
        """
        check_other_weights(self.trees)
        self._timms("load_pretrained", self.hub.model)(*args, **kwargs)

    def _timms(self, name: str, model: nn.Module) -> Callable:
        """A function that this object stands before: the user's own, or the class's."""
        if name in self.users_own and model is self.hub.model:
            return self.users_own[name]
        return partial(getattr(type(model), name), model)

    def _before_load(self, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Called by torch before ``load_state_dict`` copies anything into the model, or into a part of it."""
        if self._seen is rest[-1]:  # torch's list of errors, one for each call: this is a module inside of one seen already
            return
        self._seen = rest[-1]
        path = "" if module is self.hub.model else f"{self.hub.places[module][2]}."
        named = {path + n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        follow_weights(self.trees, named, any(n.startswith(f"{CONTAINER}.") for n in named))

    # A state dict tells by this entry that methods were attached, also where they train the model's own tensors alone.
    def get_extra_state(self) -> Tensor:
        """Which entry that is does not matter; of each model a tensor of its own, as one file may hold several models."""
        return self._mark

    def set_extra_state(self, state: Any) -> None:
        """There is nothing to take from it."""

    def _load_from_state_dict(self, state: dict, prefix: str, local: dict, strict: bool, missing: list, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, local, strict, missing, *rest)
        if f"{prefix}_extra_state" in missing:  # of an earlier version
            missing.remove(f"{prefix}_extra_state")

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


def originals_of(trees: Iterable[Tree]) -> dict[str, Tensor | None]:
    """What the model's own tensors held before these methods changed them, by name; None where there was none."""
    return {name: value for tree in trees for name, value in tree.originals().items()}


def remove(model: nn.Module, name: str) -> None:
    """Take one method off a model, whatever state it is in; with the last one, everything that came with the first."""
    container = container_of(model)
    reshard(model)
    container.hub.remove(name)
    container.hub.acting = tuple(n for n in container.hub.acting if n != name)
    del container._modules[name]
    container.stated = [n for n in container.stated if n != name]
    container.put_classifier()
    needed = {id(p.module) for tree in container.children() for i in tree.interventions for p in i.calls_needed()}
    for place in [p for p in container.patched if id(p.module) not in needed]:
        place.module.qkv_bias_separate = False
        container.patched.remove(place)
    if not container._modules:
        container.hub.uninstall()
        container.uninstall()
        for n, parameter in model.named_parameters():
            parameter.requires_grad_(container.required_grad.get(n, True))
        delattr(model, CONTAINER)
