"""``attach`` a method to a timm model, ``get_handle`` of a copy; ``load`` is in ``loading.py``."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..attached.classifier import Classifier, WantedClassifier, classifier_like
from ..attached.tree import Tree
from ..backbone.attention import needs_separate_bias_call
from ..backbone.modules import CONTAINER
from ..backbone.reading import is_taken_apart, model_inside, prove_alive
from ..backbone.sites import Sites
from ..errors import MethodError, UnsupportedModelError, did_you_mean, shown
from ..interventions.context import Watch, clips
from ..interventions.hub import Hub
from ..methods.base import Method, create
from ..shards import reshard
from .allowance import Allowance
from .container import Container, container_of, remove
from .handle import Handle
from .heads import check_heads
from .summary import model_name

_LONGEST_NAME = 100  # of a handle


def attach(
    model: nn.Module,
    method: str | Method | type[Method],
    *,
    name: str | None = None,
    heads: Mapping[str, nn.Module] | None = None,
    **options: Any,
) -> Handle:
    """Attach a method to a timm model through hooks; freeze all but the method's parameters and the head.

    The model keeps its class, its forward and every name. A method attached earlier stays, disabled; what it trains is
    frozen until it is enabled again. The handle trains a copy of the classifier; the model's own is back where it is
    disabled or detached. A method with nothing to train (no classifier, no ``heads``) gives a warning.

    Args:
        model: a timm ViT, Swin or relative (see ``vpeft.backbone``).
        method: a registered name (``vpeft.list_methods()``), or a method object.
        name: for the handle and its file; the method's name where None.
        heads: modules outside the model that train with the method, by name (a decode head): the handle trains, saves
            and loads them as it does the classifier.
        **options: the method's hyper-parameters; ``preset="…"`` starts from a published set.

    Returns:
        The handle.

    Raises:
        MethodError: unknown method or hyper-parameter, or ``name`` taken.
        UnsupportedModelError: a structure that cannot be read, or a hook that would never fire; names the place.
    """
    check_arguments(model, name, heads)
    return attach_method(model, create(method, **options), name, {} if heads is None else heads)


def get_handle(model: nn.Module, name: str | None = None) -> Handle:
    """The handle of an attached method, e.g. on a deepcopy of the model.

    Args:
        model: the model.
        name: the method's; None where only one is attached.

    Raises:
        MethodError: nothing of that name is attached.
    """
    check_wrapper(model)
    container = container_of(model)
    names = list(container._modules) if container is not None else []
    if name is None and len(names) == 1:
        name = names[0]
    if name is None and names:
        raise MethodError(f"{len(names)} methods are attached: {', '.join(names)}; say which, get_handle(model, name)")
    if not isinstance(name, str) or name not in names:
        what = "one method" if name is None else shown(name)
        raise MethodError(f"{what} is not attached{did_you_mean(name or '', names) if names else ''}")
    return Handle(model, name)


def check_arguments(model: nn.Module, name: Any, heads: Any) -> None:
    """Refuse what is of another kind than ``attach`` and ``load`` take.

    Raises:
        UnsupportedModelError: no model, or a wrapper around one.
        MethodError: a name that is no text, or heads that are no mapping.
    """
    check_wrapper(model)
    _check_not_sharded(model)
    if name is not None and not isinstance(name, str):
        raise MethodError(f"name: expected a text, got {shown(name)}")
    check_heads(model, {} if heads is None else heads)


def attach_method(
    model: nn.Module,
    method: Method,
    name: str | None,
    heads: Mapping[str, nn.Module],
    wanted: WantedClassifier | None = None,
    fill: Callable[[Handle], None] = lambda handle: None,
) -> Handle:
    """See ``attach``.

    Args:
        wanted: what the classifier must be like, where it is not to be a copy of the model's own.
        fill: puts values in; when it fails, nothing was attached.
    """
    name = method.name if name is None else name
    if not name.isidentifier() or len(name) > _LONGEST_NAME:
        raise MethodError(f"name: {shown(name)} must be letters, digits and underscores, at most {_LONGEST_NAME} of them")
    earlier = container_of(model)
    if earlier is not None and name in earlier._modules:
        raise MethodError(f"'{name}' is attached already; give name=…, or detach it")
    if Container.has_attribute(name):
        raise MethodError(f"name: '{name}' is an attribute of the module that holds attached methods; choose another")
    enabled = [Handle(model, n) for n in earlier.enabled_order] if earlier is not None else []
    for handle in enabled:
        if handle.merged:
            raise MethodError(f"'{handle.name}' is merged into the weights; unmerge() or detach() it first")
    for handle in enabled:
        handle.disable()
    frozen, own = {n: p.requires_grad for n, p in model.named_parameters()}, Classifier.of(model)
    try:
        _install(model, method, name, heads, wanted, frozen)
        fill(Handle(model, name))
    except BaseException:
        if container_of(model) is not None and name in container_of(model)._modules:
            remove(model, name)
        own.put_into(model)
        for n, parameter in model.named_parameters():
            parameter.requires_grad_(frozen[n])
        for handle in enabled:
            handle.enable()
        raise
    handle = Handle(model, name)
    if not method.needs_calibration and not any(p.requires_grad for p in handle.trainable_parameters()):
        classes = handle.root.classifier.num_classes
        reason = f"{model_name(model)} has no classifier (num_classes={classes}), and no heads=… were given"
        warnings.warn(f"nothing of '{name}' trains: {reason}", stacklevel=3)
    return handle


def _install(
    model: nn.Module,
    method: Method,
    name: str,
    heads: Mapping[str, nn.Module],
    wanted: WantedClassifier | None,
    required_grad: dict[str, bool],
) -> None:
    """Make the method's tree and let it act; what is half done at an error is taken back by the caller.

    Args:
        required_grad: which of the model's parameters require a gradient now, to be put back by the last ``detach``.
    """
    container = container_of(model)
    own = Classifier.of(model) if container is None else container.own_classifier
    classifier_like(model, own, wanted).put_into(model)
    sites = Sites(model)
    hub = Hub(model, [block.module for block in sites.blocks]) if container is None else container.hub
    tree = built_tree(name, method, sites, hub)
    if container is None:
        container = Container(hub, own, required_grad)
        model.add_module(CONTAINER, container)
        container.hub.install()
        container.install()
    container.add_module(name, tree)
    model.requires_grad_(False)
    for parameter in tree.parameters():
        parameter.requires_grad_(parameter.numel() > 0)
    for head in sites.heads:
        head.module.requires_grad_(method.trains_head)
    for intervention in tree.interventions:
        intervention.hub, intervention.owner = container.hub, name
        intervention.exchange_classifier()
        intervention.install()
        for place in intervention.calls_needed():
            if needs_separate_bias_call(place.module):
                place.module.qkv_bias_separate = True
                container.patched.append(place)
    hub.changed()  # also where nothing is done at any module yet, as of methods that train the model's own tensors
    tree.classifier = Classifier.of(model)  # a method may have put another one there
    tree.heads = dict(heads)
    tree.tell()
    container.enabled_order.append(name)
    container.shown = name
    tree.train(model.training)
    places = [p for i in tree.interventions for p in i.hooked()]
    with _named(method, model), clips(model, 1):  # one image is a clip of one frame
        prove_alive(model, places, sites.input_size)


def built_tree(name: str, method: Method, sites: Sites, hub: Hub) -> Tree:
    """The method's tree of modules, like the model in type and device; nothing of it acts yet.

    Raises:
        VpeftError: the method cannot act on the model, or has nowhere to act.
    """
    tree = Tree(name, method, sites, hub)
    like = next(p for p in sites.model.parameters() if p.is_floating_point())
    fork = torch.random.fork_rng(devices=[], enabled=like.is_meta)
    with _named(method, sites.model), fork, Allowance(method, sites.model):
        for path, module in method.build(sites):
            module.to(device=like.device, dtype=like.dtype)
            tree.add_at(path, module)
    if all(isinstance(i, Watch) for i in tree.interventions):
        raise MethodError(f"{method.name}: these hyper-parameters choose no place to act on")
    return tree


class _named:
    """Adds the method's and the model's names to an error."""

    def __init__(self, method: Method, model: nn.Module):
        self.text = f"{method.name} on {model_name(model)}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, UnsupportedModelError):
            raise UnsupportedModelError(f"{self.text}: {error}") from error


def _check_not_sharded(model: nn.Module) -> None:
    if isinstance(model, nn.Module) and reshard(model):
        raise UnsupportedModelError(
            "the model is in shards (fully_shard), which new parameters would not be: attach or load first, then shard; "
            "values for a method that is attached already: handle.load_state_dict"
        )


def check_wrapper(model: nn.Module) -> None:
    """Refuse what is no timm model, such as a wrapper around one.

    Raises:
        UnsupportedModelError: says where the model is in it.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a timm model, got {type(model).__name__}")
    if is_taken_apart(model):
        raise UnsupportedModelError(
            f"this {type(model).__name__} is no timm model but its stages, taken apart by features_only=True: create it "
            "with feature_cls='getter' too, and give its .model to attach, load and get_handle"
        )
    path = model_inside(model)
    if path:
        raise UnsupportedModelError(
            f"this {type(model).__name__} is a wrapper, the timm model is inside of it: give model.{path} to attach, load "
            "and get_handle; wrap it before or afterwards as you like"
        )
