"""``load``: the method of a file, compared with the model before anything of the model is touched."""

import copy
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import checkpoint
from ..attached.classifier import Classifier, WantedClassifier, classifier_like
from ..attached.tree import Tree
from ..backbone.modules import CONTAINER, head_places
from ..backbone.sites import Sites
from ..errors import CheckpointError, some
from ..files import naming
from ..interventions.hub import Hub
from ..methods.base import Method
from ..methods.earlier import lacking, method_of
from .attaching import attach_method, built_tree, check_arguments
from .container import container_of, originals_of
from .handle import Handle
from .heads import head_differences

Shapes = dict[str, tuple[int, ...]]


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

    The classifier is rebuilt where its number of classes differs, and taken away where the file's model had none. A
    classifier of one's own (no plain timm one) must stand in the model already. Floating-point values are converted to
    the model's type. Needs no network where the file is here.

    Args:
        model: a fresh model with the backbone weights that the file was trained on.
        path: a file that ``Handle.save`` wrote; or ``zoo:NAME``, a URL, ``hf://user/repo/file@revision``.
        name: for the handle; the one it was saved under where None.
        head: also load the classifier and ``heads``.
        heads: the modules outside the model that trained with the method, as given to ``attach``.
        check_backbone: compare the frozen weights with those it was trained on.

    Raises:
        CheckpointError: damaged, foreign, made for another backbone, or with anything in it that does not fit here; names
            the file. The model, its other handles and the heads are then as they were.
        UnsupportedModelError: a wrapper around a model.
        MethodError: an argument of the wrong kind.
    """
    check_arguments(model, name, heads)
    heads = dict(heads or {})
    file = checkpoint.read_header(path)
    with naming(file.path, Exception):
        container = container_of(model)
        if check_backbone:
            checkpoint.check_backbone(model, file, originals_of(container.trees.values() if container else ()))
        method = _method_of(file)
        shapes = {n: t for n, t in file.shapes.items() if head or n not in file.head_names}
        wanted = _wanted_classifier(file, heads) if head else None
        planned = _planned(model, method, heads, wanted)
        if planned is not None:
            _compare(planned, file, {n: s.like() for n, s in shapes.items()}, head, planned=True)
        values = {n: file.tensors[n] for n in shapes}

        def fill(handle: Handle) -> None:
            _compare(handle.root, file, values, head, planned=False)
            handle.load_state_dict(values)
            handle.root.class_names = file.metadata["class_names"] if head else None
            handle.root.calibrated = file.metadata.get("calibrated", handle.root.calibrated)

        with _Undecomposed():
            return attach_method(model, method, file.metadata["name"] if name is None else name, heads, wanted, fill)


def _method_of(file: checkpoint.File) -> Method:
    """The method with the hyper-parameters that a file means today."""
    stored, written = file.metadata["method"], file.metadata["format"]
    strange = stored["options"].keys() & {"method", "preset"}  # words of ``create``
    try:
        if strange:
            raise CheckpointError(f"{stored['name']} has no hyper-parameter {some(sorted(strange))}")
        method = method_of(file.metadata)
    except Exception as error:  # of whatever kind: the values come from a file
        raise CheckpointError(f"its method cannot be rebuilt here: {error}") from error
    missing = lacking(method.name, stored["options"])
    if missing and written == checkpoint.FORMAT:  # what older files mean is in methods/earlier.py
        raise CheckpointError(f"its metadata lack {some(missing)} of {method.name}")
    return method


def _wanted_classifier(file: checkpoint.File, heads: Mapping[str, nn.Module]) -> WantedClassifier:
    """Of the tensors of the file's head, those that are not of the heads outside the model."""
    outside = tuple(f"{name}." for name in heads)
    shapes = {n: file.shapes[n].size for n in sorted(file.head_names) if not n.startswith(outside)}
    empty = [n for n, size in shapes.items() if 0 in size]
    if empty:  # a file can declare any number of classes this way and stay small
        raise CheckpointError(
            f"its head does not fit the model's: {empty[0]} is {shapes[empty[0]]} in the file, without entries"
        )
    classes = {size[:1] for size in shapes.values()}
    if len(classes) == 1 and classes != {()}:  # of a plain classifier; num_classes may be another where a user put it there
        return WantedClassifier(shapes, classes.pop()[0])
    return WantedClassifier(shapes, 0 if not shapes and file.metadata["num_classes"] == 0 else None)


def _compare(tree: Tree, file: checkpoint.File, values: Mapping[str, Tensor], head: bool, planned: bool) -> None:
    """Refuse tensors of a file that are not those of the method and of the heads."""
    tree.check({n: t for n, t in values.items() if n not in file.head_names}, planned=planned)
    if head:
        found: Shapes = {n: tuple(t.shape) for n, t in tree.head_tensors().items()}
        wanted: Shapes = {n: file.shapes[n].size for n in file.head_names}
        if wanted and found != wanted:
            raise CheckpointError(f"its head does not fit the model's: {head_differences(wanted, found)}")
        tree.check_class_names(file.metadata["class_names"])
        tree.check(values, planned=planned)


# ---- what it would be, without memory ----


class _WithoutValues(TorchFunctionMode):
    """Under here copies of tensors are on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.__deepcopy__ and type(args[0]) is Tensor:
            return args[1].setdefault(id(args[0]), args[0].detach().to("meta"))
        if func is Tensor.clone:
            return args[0].to("meta")
        return func(*args, **(kwargs or {}))


class _Undecomposed(TorchFunctionMode):
    """Under here weights are not decomposed: what a method would start from gives way to the file's tensors, all of them."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func not in (torch.linalg.svd, torch.linalg.qr):
            return func(*args, **(kwargs or {}))
        matrix, *others = args
        found = func(matrix.to("meta"), *others, **(kwargs or {}))
        return type(found)([torch.zeros_like(part, device=matrix.device) for part in found])


def _planned(
    model: nn.Module, method: Method, heads: Mapping[str, nn.Module], wanted: WantedClassifier | None
) -> Tree | None:
    """The tree that ``attach`` would make, without values: what a file asks for is known before memory is taken for it.

    None where it cannot be made that way (a model that cannot be copied, a method of one's own that computes with values
    when it is built, a refusal): attaching then says what is wrong.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            sites, own = _without_values(model)
            classifier_like(sites.model, own, wanted).put_into(sites.model)
            sites.heads = head_places(sites.model)
            hub = Hub(sites.model, [block.module for block in sites.blocks])
            with torch.device("meta"):
                tree = built_tree(method.name, method, sites, hub)
            for intervention in tree.interventions:
                intervention.exchange_classifier()
            tree.classifier = Classifier.of(sites.model)
    except Exception:  # whatever it is, attaching meets it again
        return None
    tree.heads = dict(heads)
    return tree


def _without_values(model: nn.Module) -> tuple[Sites, Classifier]:
    """What was read of the model, and its own classifier, on a copy without values, hooks and attached methods."""
    container = container_of(model)
    sites = Sites(model) if container is None else next(iter(container.trees.values())).sites
    own = Classifier.of(model) if container is None else container.own_classifier
    memo: dict[int, Any] = {}
    for module in [*model.modules(), *(m for part in own.modules.values() for m in part.modules())]:
        tables = [value for key, value in vars(module).items() if key.endswith("_hooks") and isinstance(value, dict)]
        memo |= {id(table): OrderedDict() for table in tables}
    if container is not None:
        memo |= {id(container): nn.Module(), id(container.hub): container.hub}
    with _WithoutValues():
        sites, own = copy.deepcopy((sites, own), memo)
    sites.model._modules.pop(CONTAINER, None)
    return sites, own
