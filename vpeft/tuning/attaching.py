"""``attach`` a method to a timm model, ``load`` one from a file, ``get_handle`` of a copy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..attached.classifier import Classifier, fresh_classifier
from ..attached.tree import Tree
from ..backbone.attention import needs_separate_bias_call
from ..backbone.modules import CONTAINER
from ..backbone.reading import prove_alive
from ..backbone.sites import Sites
from ..errors import CheckpointError, MethodError, UnsupportedModelError, VpeftError, did_you_mean
from ..interventions.context import clips
from ..interventions.hub import Hub
from ..methods.base import Method, create
from ..methods.earlier import options_of
from ..shards import reshard
from .container import Container, container_of, remove
from .handle import Handle
from .heads import check_heads, head_differences
from .summary import model_name


def attach(
    model: nn.Module,
    method: str | Method | type[Method],
    *,
    name: str | None = None,
    heads: Mapping[str, nn.Module] | None = None,
    **options: Any,
) -> Handle:
    """Attach a method to a timm model through hooks; freeze all but the method's parameters and the head.

    The model keeps its class, its forward and every name. A method attached earlier stays, disabled, its
    parameters frozen. The handle trains a copy of the classifier; the model's own is back where it is disabled or detached.

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
    return _attach(model, create(method, **options), name, heads or {})


def get_handle(model: nn.Module, name: str | None = None) -> Handle:
    """The handle of an attached method, e.g. on a deepcopy of the model.

    Args:
        model: the model.
        name: the method's; None where only one is attached.

    Raises:
        MethodError: nothing of that name is attached.
    """
    container = container_of(model)
    names = list(container._modules) if container is not None else []
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        what = f"'{name}'" if name else "one method"
        raise MethodError(f"{what} is not attached{did_you_mean(name or '', names) if names else ''}")
    return Handle(model, name)


def load(
    model: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    head: bool = True,
    heads: Mapping[str, nn.Module] | None = None,
    check_backbone: bool = True,
) -> Handle:
    """Attach the method that a file holds and put its values in.

    The classifier is rebuilt where its number of classes differs. Needs no network.

    Args:
        model: a fresh model with the backbone weights that the file was trained on.
        path: a file that ``Handle.save`` wrote.
        name: for the handle; the one it was saved under where None.
        head: also load the classifier and ``heads``.
        heads: the modules outside the model that trained with the method, as given to ``attach``.
        check_backbone: compare the frozen weights with those it was trained on.

    Raises:
        CheckpointError: damaged, foreign, or made for another backbone; the model is then as it was.
    """
    _check_not_sharded(model)
    file = checkpoint.read(Path(path))
    if check_backbone:
        checkpoint.check_backbone(model, file)
    head_tensors = {n: t for n, t in file.tensors.items() if n in file.head_names} if head else {}
    stored = file.metadata["method"]
    try:
        method = create(stored["name"], **options_of(stored["name"], stored["options"], file.metadata["format"]))
    except VpeftError as error:
        raise CheckpointError(f"{path}: its method cannot be rebuilt here: {error}") from error
    outside = tuple(f"{n}." for n in heads or {})
    wanted = _Wanted.of({n: t for n, t in head_tensors.items() if not n.startswith(outside)})

    def fill(handle: Handle) -> None:
        handle.load_state_dict({n: t for n, t in file.tensors.items() if n not in file.head_names})
        current = handle.head_state_dict()
        found, expected = ({n: tuple(t.shape) for n, t in tensors.items()} for tensors in (current, head_tensors))
        if expected and found != expected:
            raise CheckpointError(f"{path}: its head does not fit the model's: {head_differences(expected, found)}")
        with torch.no_grad():
            for n, t in head_tensors.items():
                current[n].copy_(t)

    return _attach(model, method, name or file.metadata["name"], heads or {}, wanted, fill)


@dataclass(frozen=True)
class _Wanted:
    """What a file's classifier is like: the shapes of its tensors by name, and how many classes it has."""

    shapes: dict[str, tuple[int, ...]]
    classes: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "_Wanted | None":
        """From the classifier's tensors; None where there are none."""
        ends = [t for n, t in tensors.items() if n.endswith(("bias", "weight"))]
        return cls({n: tuple(t.shape) for n, t in tensors.items()}, ends[0].shape[0]) if ends else None


def _attach(
    model: nn.Module,
    method: Method,
    name: str | None,
    heads: Mapping[str, nn.Module],
    wanted: _Wanted | None = None,
    fill: Callable[[Handle], None] = lambda handle: None,
) -> Handle:
    """See ``attach``.

    Args:
        wanted: what the classifier must be like, where it is not to be a copy of the model's own.
        fill: puts values in; when it fails, nothing was attached.
    """
    _check_wrapper(model)
    _check_not_sharded(model)
    name = name or method.name
    if not name.isidentifier():
        raise MethodError(f"name: '{name}' must be letters, digits and underscores")
    check_heads(model, heads)
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
    return Handle(model, name)


def _install(
    model: nn.Module,
    method: Method,
    name: str,
    heads: Mapping[str, nn.Module],
    wanted: _Wanted | None,
    required_grad: dict[str, bool],
) -> None:
    """Make the method's tree and let it act; what is half done at an error is taken back by the caller.

    Args:
        required_grad: which of the model's parameters require a gradient now, to be put back by the last ``detach``.
    """
    container = container_of(model)
    own = Classifier.of(model) if container is None else container.own_classifier
    classifier = own.twin()
    if wanted and classifier.shapes() != wanted.shapes and Classifier.of(model).num_classes != wanted.classes:
        classifier = fresh_classifier(model, wanted.classes)
    classifier.put_into(model)
    sites = Sites(model)
    hub = Hub(model, [block.module for block in sites.blocks]) if container is None else container.hub
    tree = _tree(name, method, sites, hub)
    if container is None:
        container = Container(hub, own, required_grad)
        model.add_module(CONTAINER, container)
        container.hub.install()
        model.reset_classifier = container.reset_classifier
    container.add_module(name, tree)
    model.requires_grad_(False)
    for parameter in tree.parameters():
        parameter.requires_grad_(parameter.numel() > 0)
    for head in sites.heads:
        head.module.requires_grad_(method.trains_head)
    for intervention in tree.interventions:
        intervention.hub, intervention.owner = container.hub, name
        intervention.install()
        for place in intervention.calls_needed():
            if needs_separate_bias_call(place.module):
                place.module.qkv_bias_separate = True
                container.patched.append(place)
    tree.classifier = Classifier.of(model)  # a method may have put another one there
    tree.heads = dict(heads)
    tree.tell()
    container.enabled_order.append(name)
    container.shown = name
    tree.train(model.training)
    places = [p for i in tree.interventions for p in i.hooked()]
    with _named(method, model), clips(model, 1):  # one image is a clip of one frame
        prove_alive(model, places, sites.input_size)


def _tree(name: str, method: Method, sites: Sites, hub: Hub) -> Tree:
    tree = Tree(name, method, sites, hub)
    like = next(p for p in sites.model.parameters() if p.is_floating_point())
    count = 0
    with _named(method, sites.model), torch.random.fork_rng(devices=[], enabled=like.is_meta):
        for path, module in method.build(sites):
            module.to(device=like.device, dtype=like.dtype)
            tree.add_at(path, module)
            count += 1
    if not count:
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


def _check_wrapper(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a timm model, got {type(model).__name__}")
    for wrapper, inner in (("OptimizedModule", "_orig_mod"), ("DistributedDataParallel", "module")):
        if type(model).__name__ == wrapper:
            raise UnsupportedModelError(
                f"the model is wrapped in {wrapper}; attach to the model inside (.{inner}) and wrap it afterwards"
            )
