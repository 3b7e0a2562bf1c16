"""What becomes of attached methods when their model gets other weights or another input size."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..attached.tree import Tree
from ..backbone.modules import CONTAINER, head_places
from ..backbone.reading import dry_forward, input_size
from ..errors import MethodError, VpeftError, some
from ..interventions.weights import ReplaceTensor
from ..shards import reshard

FIRST_LOAD = "load the backbone's weights before attach: detach(), load them, attach again"


def follow_weights(trees: Mapping[str, Tree], state: Mapping[str, Any], own: bool) -> None:
    """Called before ``model.load_state_dict`` changes anything: what the methods keep of the old weights follows.

    Methods that only add to the model are not concerned. The originals of tensors that a method trains become the new
    values, which are its new start too. What was computed from the old weights cannot follow.

    Args:
        trees: of the attached methods.
        state: the tensors that are about to be loaded, by the model's names.
        own: they come from a model with methods attached: values of trained tensors are trained ones.

    Raises:
        MethodError: names the handle, and the way that works; then nothing was changed.
    """
    if not trees:
        return
    model = next(iter(trees.values())).model
    heads = tuple(f"{head.path}." for head in head_places(model))
    live = {n: t for n, t in model.state_dict().items() if not n.startswith((f"{CONTAINER}.", *heads)) and n in state}
    if any(type(t) not in (Tensor, nn.Parameter) for n in live for t in (live[n], state[n])):
        return  # parts of tensors that are spread over processes, or no tensors
    changed = {n for n, t in live.items() if t.shape == state[n].shape and not _same(state[n], t)}
    trained = {n for tree in trees.values() for e in tree.existing for n in e.slots}
    if changed <= trained and live.keys() - trained:
        own = True  # another backbone would have other frozen weights too
    unknown = {n for tree in trees.values() for e in tree.existing for n, t in e.inactive.items() if t.is_meta}
    new = changed - (trained - unknown) if own else changed
    if not new:
        return
    for name, tree in trees.items():
        brought = own and all(f"{CONTAINER}.{name}.{n}" in state for n in tree.state_dict())
        _check_follows(name, tree, new, own, brought)
    for tree in trees.values():
        for existing in tree.existing:
            for n in existing.slots.keys() & state.keys():
                if state[n].shape == existing.inactive[n].shape:
                    existing.inactive[n] = state[n].detach().to(existing.inactive[n], copy=True)


def _check_follows(name: str, tree: Tree, new: set[str], own: bool, brought: bool) -> None:
    """See ``follow_weights``; ``brought``: the method's own tensors come along."""
    what = f"other weights for the backbone ({some(sorted(new))})"
    if tree.unmerged is not None:
        raise MethodError(f"'{name}' is merged into the weights, which {what} would replace; unmerge() first")
    if tree.from_weights and not brought:
        raise MethodError(
            f"'{name}' ({tree.method.name}) was made from the weights that the model has now; {what} would not fit it; "
            f"{FIRST_LOAD}"
        )
    if tree.existing and own:
        raise MethodError(
            f"'{name}' trains the model's own tensors, and knows the values before training of the present weights alone; "
            f"these are {what}; load the backbone's weights before attach, then this state"
        )
    if tree.existing and not tree.enabled:
        raise MethodError(f"'{name}' is disabled, and what it trained belongs to the present weights; {FIRST_LOAD}")


def check_other_weights(trees: Mapping[str, Tree]) -> None:
    """Refuse other weights that come in a way which cannot be followed (timm's ``load_pretrained``).

    Raises:
        MethodError: names a handle that depends on the present ones.
    """
    for name, tree in trees.items():
        if tree.unmerged is not None or tree.from_weights or tree.existing:
            raise MethodError(f"'{name}' depends on the weights that the model has now; {FIRST_LOAD}")


def follow_size(model: nn.Module, trees: Mapping[str, Tree], change: Any) -> None:
    """Give a model another input size, after it was tried on a copy that every attached method can follow.

    Args:
        model: the model.
        trees: of its attached methods.
        change: ``change(model)`` does it.

    Raises:
        MethodError: names the handle that cannot; then nothing was changed.
    """
    for name, tree in trees.items():
        if tree.unmerged is not None:
            raise MethodError(f"'{name}' is merged into the weights; unmerge() before changing the input size")
    if reshard(model):
        raise MethodError("the model is in shards, tensors of another size would not be: set_input_size before fully_shard")
    trial = copy.deepcopy(model)
    change(trial)
    shapes = {n: t.shape for n, t in model.state_dict().items()}
    resized = {n for n, t in trial.state_dict().items() if shapes.get(n) != t.shape}
    copies: dict[str, Tree] = dict(getattr(trial, CONTAINER).named_children())
    for name, tree in copies.items():
        held = resized & set(_held(tree))
        if held:
            raise MethodError(
                f"'{name}' has its own values of {some(sorted(held))}, which another input size replaces; "
                "call set_input_size before attach: detach(), set_input_size, attach again"
            )
        try:
            with tree.hub.running((name,)):
                dry_forward(trial, input_size(trial))
        except VpeftError as error:
            raise MethodError(
                f"'{name}' cannot follow another input size: {error}; call set_input_size before attach"
            ) from error
    required_grad = {n: p.requires_grad for n, p in model.named_parameters()}
    change(model)
    for n, p in model.named_parameters():  # timm makes some of them anew
        p.requires_grad_(required_grad.get(n, False))
    for tree in trees.values():
        tree.sites.input_size = input_size(model)


def _held(tree: Tree) -> Iterator[str]:
    for existing in tree.existing:
        yield from existing.slots
    for intervention in tree.interventions:
        if isinstance(intervention, ReplaceTensor):
            yield intervention.tensor_name


@torch.no_grad()
def _same(new: Tensor, old: Tensor) -> bool:
    if new.is_meta or old.is_meta:
        return False
    return torch.equal(new.detach().to(old), old)
