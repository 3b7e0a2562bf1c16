"""All that one attached method brought to a model, as a tree of modules, and what a method may do with it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.modules import CONTAINER, ModuleRef
from ..backbone.sites import Sites
from ..errors import CheckpointError, VpeftError, did_you_mean, some
from ..interventions.base import Intervention, set_tensor
from ..interventions.hub import Hub
from ..interventions.weights import ExistingTensors
from ..numerics import why_not_copied
from ..shards import is_shard, put, reshard, whole
from .classifier import Classifier
from .objective import Objective

_RESIZED = "its size depends on data, and cannot change in a model that is in shards: before fully_shard call"


class Tree(nn.Module):
    """A method's modules, at the paths that ``build`` gave. It is what a method sees of itself once it is attached.

    Attributes:
        name: of the handle.
        method: the method with its hyper-parameters.
        sites: what was read of the model.
        hub: of the model.
        classifier: the classifier that belongs to this handle, in the model or waiting for its turn.
        heads: modules outside the model that train with it, by name.
        enabled: it was not switched off by ``disable``.
        resting: while it is switched off, which of its parameters train once it is on again.
        calibrated: it has looked at data.
        unmerged: while merged, what each folded module held before, as (place, tensor's name, value or None).
        folded: while only a part of it is merged, the interventions that are; the others act on.
    """

    def __init__(self, name: str, method: Any, sites: Sites, hub: Hub):
        super().__init__()
        self.name, self.method, self.sites, self.hub = name, method, sites, hub
        self.classifier = Classifier.of(sites.model)
        self.heads: dict[str, nn.Module] = {}  # a plain dict: they are no part of the model's tree
        self.enabled, self.calibrated = True, False
        self.resting: dict[str, bool] = {}
        self.task: Objective | None = None
        self.unmerged: list[tuple[ModuleRef, str, Tensor | None]] | None = None
        self.folded: list[Intervention] = []

    def add_at(self, path: str, module: nn.Module) -> None:
        """Put a module at a dotted path, with empty modules on the way."""
        node: nn.Module = self
        *way, leaf = path.split(".")
        for part in way:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = node._modules[part]
        if leaf in node._modules:
            # An earlier path went through here: the new module takes over what already hangs there.
            for name, child in node._modules[leaf].named_children():
                module.add_module(name, child)
        node._modules[leaf] = module

    @property
    def model(self) -> nn.Module:
        """The timm model."""
        return self.sites.model

    @property
    def interventions(self) -> list[Intervention]:
        """All of them, in the order of their sequence, else of their names' first appearance."""
        return sorted((m for m in self.modules() if isinstance(m, Intervention)), key=lambda m: m.sequence)

    @property
    def existing(self) -> list[ExistingTensors]:
        """Those that train the model's own tensors."""
        return [m for m in self.interventions if isinstance(m, ExistingTensors)]

    @property
    def from_weights(self) -> bool:
        """Something of it was computed from the weights that the model has."""
        looked = self.method.needs_calibration and self.calibrated
        return looked or any(intervention.from_weights for intervention in self.interventions)

    @property
    def objective(self) -> Objective:
        """The task's loss while ``calibrate`` runs for a task of its own; else the cross-entropy of the model's logits."""
        return self.task or Objective(self.model, self.heads)

    def forward(self) -> None:
        raise VpeftError("this module holds a method's parts; call the model itself")

    # ---- on and off ----

    def switch(self, on: bool) -> None:
        """Let its parts act, or not; the classifier is another matter."""
        if on != self.enabled:
            reshard(self.model)  # what is written into whole parameters that a forward left there would be lost
            self.enabled = on
            for intervention in self.interventions:
                intervention.on_toggle()
            resting = {} if on else {n: p.requires_grad for n, p in self.trained()}
            for name, parameter in self.trained():
                parameter.requires_grad_(on and self.resting.get(name, True))
            self.resting = resting
            self.tell()

    def let_train(self, value: bool) -> None:
        """Let the method's parameters train or not, from now on and, while it is switched off, once it is on again."""
        if not self.enabled:
            self.resting = dict.fromkeys(self.resting, value)
            return
        for _, parameter in self.trained():
            parameter.requires_grad_(value)

    def tell(self) -> None:
        """Tell the hub whether it acts."""
        acting = [name for name in self.hub.acting if name != self.name]
        acts = self.enabled and (self.unmerged is None or bool(self.folded))
        self.hub.acting = (*acting, self.name) if acts else tuple(acting)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Under here the backbone computes what it would without the method; the classifier stays."""
        was = self.enabled
        self.switch(False)
        try:
            yield
        finally:
            self.switch(was)

    def eval_all(self) -> None:
        """Evaluation mode for the model, the method and every head."""
        for module in (self.model, *self.heads.values()):
            module.eval()

    @property
    def outputs(self) -> int | None:
        """How many classes the model tells apart; None where heads outside of it decide that, or where it cannot be read."""
        if self.heads:
            return None
        return next((i.outputs for i in self.interventions if i.outputs is not None), self.classifier.outputs)

    def check_class_names(self, names: Sequence[Any] | None) -> None:
        """Refuse names that are more or fewer than the classes.

        Raises:
            CheckpointError: with both numbers.
        """
        if names is not None and self.outputs is not None and len(names) != self.outputs:
            raise CheckpointError(f"class_names: {len(names)} names for {self.outputs} outputs of the classifier")

    # ---- tensors ----

    def state(self) -> dict[str, Tensor]:
        """The method's tensors by their names in this tree, and tensors of the model that it trains by the model's names."""
        reshard(self.model)
        state = dict(self.state_dict())  # parameters and persistent buffers
        for existing in self.existing:
            state |= existing.values()
        # While merged, a trained tensor of the model may hold a folded value.
        folded = {f"{place.path}.{n}": value for place, n, value in self.unmerged or ()}
        return state | {n: folded[n] for n in folded.keys() & state.keys() if folded[n] is not None}

    def originals(self) -> dict[str, Tensor | None]:
        """What the model's own tensors held before this method changed them, where it has; None where there was none."""
        found: dict[str, Tensor | None] = {f"{place.path}.{n}": value for place, n, value in self.unmerged or ()}
        for existing in self.existing:
            found |= existing.inactive if existing.in_use else {}
        return found

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The method's parameters by the names of ``state``; one of no entries (an empty mask) is left out."""
        reshard(self.model)
        yield from ((n, p) for n, p in self.named_parameters() if p.numel())
        for existing in self.existing:
            yield from existing.tensors()

    @property
    def head_places(self) -> list[ModuleRef]:
        """What trains beside the method: its classifier(s), and the modules outside the model."""
        container = getattr(self.model, CONTAINER, None)
        if container is not None:
            container.adopt_classifier()
        reshard(self.model, *self.heads.values())
        return [*self.classifier.heads, *(ModuleRef(name, module) for name, module in self.heads.items())]

    def head_tensors(self) -> dict[str, Tensor]:
        """The heads' tensors: a classifier's by the model's names, others' by the names given to ``attach``."""
        return {
            f"{head.path}.{name}": value
            for head in self.head_places
            for name, value in head.module.state_dict(keep_vars=False).items()
        }

    def head_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The heads' parameters, named as in ``head_tensors``."""
        for head in self.head_places:
            for name, parameter in head.module.named_parameters():
                yield f"{head.path}.{name}", parameter

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], strict: bool = True) -> None:
        """Copy tensors in, by the names of ``state``; the heads' are taken too where they are given.

        Raises:
            CheckpointError: see ``check``, and values that do not fit each other; then nothing was changed.
        """
        self.check(state, strict)
        own, resizable = self.state(), self._resizable()
        known = own | self.head_tensors()
        state = {n: _shaped(v, known[n]) for n, v in state.items() if n in known}
        self._check_values(state, known)
        # Converted before the first is copied: what fails here fails before anything was changed.
        ready = {n: whole(v.detach()).to(known[n].device, known[n].dtype) for n, v in state.items()}
        existing = {n: e for e in self.existing for n in e.slots}
        self.calibrated = self.calibrated or not own.keys() - ready.keys()
        for name, value in ready.items():
            if name in existing:
                existing[name].set_value(name, value)
            elif name in resizable and value.shape != known[name].shape:
                module, leaf = resizable[name]
                set_tensor(module, leaf, value)
            else:
                put(known[name], value)
        for intervention in self.interventions:
            intervention.on_load()
        if self.method.needs_calibration and not self.method.looks_calibrated(self):
            self.calibrated = False  # these are of a handle that had not been calibrated either

    def check(self, state: Mapping[str, Tensor], strict: bool = True, planned: bool = False) -> None:
        """Refuse tensors that ``load`` could not take; values are not looked at, and ``planned`` ones are without.

        Raises:
            CheckpointError: a missing or unknown name (where ``strict``), no plain tensor, a wrong shape, or a type that
                does not convert without loss of meaning (whole numbers, truth values, complex numbers).
        """
        if not isinstance(state, Mapping) or not all(isinstance(n, str) for n in state):
            raise CheckpointError(f"expected a mapping of names to tensors, got {type(state).__name__}")
        own, heads = self.state(), self.head_tensors()
        if strict:
            self._check_names(sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys() - heads.keys()))
        resizable, known = self._resizable(), own | heads
        in_shards = any(is_shard(t) for t in known.values())
        for name, value in ((n, v) for n, v in state.items() if n in known):
            value = _shaped(value, known[name])
            problem = why_not_copied(value, known[name], name in resizable, planned)
            if not problem and in_shards and value.shape != known[name].shape:
                problem = f"{_RESIZED} load_state_dict"
            if problem:
                raise CheckpointError(f"{name}: {problem}")

    def _resizable(self) -> dict[str, tuple[nn.Module, str]]:
        """Tensors whose size depends on data, as (module, its name there)."""
        return {
            f"{path}.{leaf}".lstrip("."): (module, leaf)
            for path, module in self.named_modules()
            for leaf in getattr(module, "resizable", ())
        }

    def _check_names(self, missing: list[str], unknown: list[str]) -> None:
        parts = [f"missing {some(missing)}"] if missing else []
        if unknown:
            parts.append(f"unknown {some(unknown)}{did_you_mean(unknown[0], missing) if missing else ''}")
        if parts:
            raise CheckpointError(f"tensors do not fit {self.method.name} on this model: {'; '.join(parts)}")

    def _check_values(self, state: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> None:
        for path, module in self.named_modules():
            if isinstance(module, Intervention) and module.resizable:
                names = {leaf: f"{path}.{leaf}".lstrip(".") for leaf in module.resizable}
                problem = module.why_not({leaf: state.get(n, known[n]) for leaf, n in names.items()})
                if problem:
                    raise CheckpointError(f"{path}: {problem}")


def _shaped(value: Any, known: Tensor) -> Any:
    """One number as a number or as a vector, as it is known here: FSDP2 takes vectors only."""
    one = isinstance(value, Tensor) and value.layout == torch.strided and {value.ndim, known.ndim} == {0, 1}
    return value.reshape(known.shape) if one and value.numel() == known.numel() == 1 else value
