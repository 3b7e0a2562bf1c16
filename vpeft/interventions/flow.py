"""The state of one forward: who acts in it, and what interventions keep from one module's hook to a later one's."""

from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.modules import reentrant_checkpointing
from ..errors import MethodError

Key = tuple[int, str, int]  # whose, which, of which rows


class Flow:
    """One forward under way: made when it starts, gone when it ends or fails, of one thread alone (see ``Hub``).

    Attributes:
        acting: names of the handles that act in it.
        facts: what its caller states: ``frames`` of a clip; ``maps``, where feature maps are read and nothing is pooled.
        state: what interventions keep, by intervention and name.
        carried: of these, what ``forward_head`` still needs behind ``forward_features``.
        starter: the module whose call it is.
        outer: the flow that goes on when this one has ended.
        checkpointed: blocks will run again in backward.
        exported: torch.export follows it.
        task: the backward pass whose blocks run again in it, or None.
        plan: which rows are whose, where each sample uses its own handle; None where all use those that act.
        routed: there is a plan, or these are rows of one part of it.
        span: which rows of a routed batch are under way, since a handle may have several: state is theirs alone.
    """

    def __init__(
        self,
        acting: tuple[str, ...],
        facts: dict[str, Any] | None = None,
        *,
        starter: nn.Module | None = None,
        outer: "Flow | None" = None,
        checkpointed: bool = False,
        plan: Any = None,
        routed: bool = False,
    ):
        self.plan, self.routed, self.span = plan, routed, 0
        self.acting, self.facts = acting, facts or {}
        self.state: dict[Key, Any] = {}
        self.carried: set[Key] = set()
        self.starter, self.outer, self.checkpointed = starter, outer, checkpointed
        self.at_entry: dict[Key, int] = {}  # what the state held where the last block was entered, by ids
        self.called: set[str] = set()  # of the starter's own functions, those that were called
        self.busy = False  # one of them runs
        self.task: int | None = None
        self.exported = False
        self.closed = False

    def put(self, owner: object, name: str, value: Any, *, carried: bool = False) -> None:
        """Keep something for a later hook of this forward; ``carried`` beyond the features, for the classifier's side."""
        self.state[id(owner), name, self.span] = value
        if carried:
            self.carried.add((id(owner), name, self.span))

    def get(self, owner: object, name: str) -> Any:
        """What was put; None where nothing was."""
        return self.state.get((id(owner), name, self.span))

    def pop(self, owner: object, name: str) -> Any:
        """What was put, which is then forgotten; None where nothing was."""
        return self.state.pop((id(owner), name, self.span), None)

    def after_features(self) -> "Flow | None":
        """What the classifier's side goes on with, or None where it needs nothing."""
        kept = {key: value for key, value in self.state.items() if key in self.carried}
        return self._with(kept) if kept or self.routed else None

    def enter(self) -> None:
        """A block begins that will run again in backward."""
        self.at_entry = {key: id(value) for key, value in self.state.items()}

    def hands_on(self) -> bool:
        """Whether that block has left tensors here, for what follows it."""
        new = [value for key, value in self.state.items() if self.at_entry.get(key) != id(value)]
        return any(isinstance(v, Tensor) for value in new for v in (value if isinstance(value, tuple) else (value,)))

    def snapshot(self) -> "Flow":
        """Its present state without graphs: the same values, which require a gradient where these do."""
        return self._with({key: _leaf(value) for key, value in self.state.items()})

    def again(self) -> "Flow":
        """A flow that goes on from this one's state, which stays as it is."""
        return self._with(dict(self.state))

    def _with(self, state: dict[Key, Any]) -> "Flow":
        flow = Flow(self.acting, self.facts, plan=self.plan, routed=self.routed)
        flow.state, flow.carried = state, set(self.carried)
        return flow

    def close(self) -> None:
        """End it, and drop what it holds."""
        self.closed = True
        self.state.clear()


def check_hands_nothing_on(flow: Flow, path: str) -> None:
    """Refuse what leaves a block beside its output where torch's reentrant checkpointing brings no gradient back to it.

    Raises:
        MethodError: names the block and the switch.
    """
    if torch.is_grad_enabled() or not reentrant_checkpointing() or not flow.hands_on():
        return
    raise MethodError(
        f"reentrant activation checkpointing gives no gradient to what a method hands on from {path} to later modules; "
        "switch it off: timm.layers.set_reentrant_ckpt(False)"
    )


def _leaf(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_leaf(v) for v in value)
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
