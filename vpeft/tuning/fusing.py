"""``fuse``: trained adapters, attached here or in files, mixed by a fusion that holds copies of them."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import checkpoint
from ..errors import MethodError, VpeftError, shown
from ..fetching import is_source
from ..files import naming
from ..methods.base import Method
from ..methods.fusion import TrainedAdapter, fusion_of, why_not_fused
from .attaching import attach_method, check_arguments
from .container import container_of, originals_of
from .handle import Handle
from .loading import _method_of, _planned

Adapters = Handle | str | Path


def fuse(
    model: nn.Module,
    adapters: Iterable[Adapters] | Mapping[str, Adapters],
    *,
    name: str = "fusion",
    heads: Mapping[str, nn.Module] | None = None,
    check_backbone: bool = True,
    **options: Any,
) -> Handle:
    """Attach a fusion of trained adapters (AdapterFusion, arXiv 2005.00247): they stay frozen, it and the head train.

    It copies their tensors, so that nothing changes when they are trained on or detached, and its file needs no other. Their
    heads are not taken: the handle's classifier is a copy of the model's own, as ``attach`` makes it.

    Args:
        model: the timm model.
        adapters: at least two; each a handle on this model, the name of one, or a file. A mapping gives them names;
            else they keep those of their handles.
        name: for the new handle.
        heads: see ``attach``.
        check_backbone: compare the frozen weights with those that the files were trained on.
        **options: the method's, besides the adapters.

    Returns:
        The handle; what was enabled before is disabled.

    Raises:
        MethodError: fewer than two, two of one name, handles of another model, adapters of a kind that cannot be fused or
            that stand at different places. The model is then as it was.
        CheckpointError: a file that is damaged, foreign, made for another backbone, or of a kind that cannot be fused.
    """
    heads = {} if heads is None else heads
    check_arguments(model, name, heads)
    sources: dict[str, TrainedAdapter] = {}
    for given, adapter in _named(adapters):
        own, source = _source(model, adapter, check_backbone)
        own = own if given is None else given
        if own in sources:
            raise MethodError(f"fuse: two adapters are called '{own}'; name them, fuse(model, {{'…': adapter, …}})")
        sources[own] = source
    method, tensors = fusion_of(sources, options)

    def fill(handle: Handle) -> None:
        frozen = {n for n, _ in handle.root.named_buffers()}
        if frozen != tensors.keys():
            raise MethodError(
                f"fuse: {shown(sorted(frozen ^ tensors.keys())[0])} is not in both the adapters and the fusion"
            )
        handle.root.load(tensors, strict=False)

    return attach_method(model, method, name, heads, fill=fill)


def _named(adapters: Any) -> list[tuple[str | None, Any]]:
    """The adapters with the names that were given to them."""
    if isinstance(adapters, Mapping):
        return list(adapters.items())
    if isinstance(adapters, str | Path | Handle) or not isinstance(adapters, Iterable):
        raise MethodError(
            f"fuse: expected a list of handles, names or files, or a mapping of names to these, got {shown(adapters)}"
        )
    return [(None, adapter) for adapter in adapters]


def _source(model: nn.Module, adapter: Any, check_backbone: bool) -> tuple[str, TrainedAdapter]:
    """The adapter's own name and what is copied of it."""
    container = container_of(model)
    attached = container.trees if container is not None else {}
    if isinstance(adapter, str) and adapter in attached:
        adapter = Handle(model, adapter)
    if isinstance(adapter, Handle):
        return adapter.name, _of_handle(model, adapter)
    if not isinstance(adapter, str | Path):
        raise MethodError(f"fuse: {shown(adapter)} is no handle, name or file")
    if isinstance(adapter, str) and not is_source(adapter) and not os.path.exists(adapter):
        here = f"attached are {', '.join(attached)}" if attached else "nothing is attached"
        raise MethodError(f"fuse: {shown(adapter)} is neither attached ({here}) nor a file")
    file = checkpoint.read_header(adapter)
    with naming(file.path, Exception):
        if check_backbone:
            checkpoint.check_backbone(model, file, originals_of(attached.values()))
        method = _method_of(file)
        _check(model, method, {n: s.like() for n, s in file.shapes.items() if n not in file.head_names})
        tensors = {n: t for n, t in file.tensors.items() if n not in file.head_names}
        return file.metadata["name"], TrainedAdapter(method, tensors, checkpoint.checksum("", tensors))


def _of_handle(model: nn.Module, handle: Handle) -> TrainedAdapter:
    tree = handle.root
    if handle.model is not model:
        raise MethodError(f"fuse: '{handle.name}' is attached to another model; save it and give the file")
    method, tensors = handle.method.exported(tree)
    if any(t.is_meta for t in tensors.values()):
        raise MethodError(f"fuse: '{handle.name}' is on the meta device and has no values to copy")
    try:
        _check(model, method, tensors)
    except VpeftError as error:
        raise type(error)(f"fuse: '{handle.name}': {error}") from error
    return TrainedAdapter(method, tensors, checkpoint.checksum("", tensors))


def _check(model: nn.Module, method: Method, tensors: Mapping[str, Tensor]) -> None:
    """Refuse what cannot be fused, and tensors that are not the method's on this model."""
    if problem := why_not_fused(method):
        raise MethodError(problem)
    planned = _planned(model, method, {}, None)
    if planned is not None:
        planned.check(tensors, planned=True)
