"""The handle of an attached method."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.modules import IMAGE, ModuleRef, head_places
from ..backbone.sites import Sites
from ..errors import CheckpointError, MethodError, did_you_mean
from ..interventions.base import Folded, Intervention, set_tensor
from ..interventions.weights import ExistingTensors
from ..methods.base import Method
from . import checkpoint
from .calibration import Criterion, Objective, _Batches
from .summary import _model_name, _sites_table, _some
from .tree import CONTAINER, Root, _remove


@dataclass(frozen=True)
class CacheNeeds:
    """What a method needs of the frozen features below its first trained site; everything else there can be left out.

    Attributes:
        first: the first block that must really run; the number of blocks where only what follows them must.
        heads_only: the classifiers' inputs are all that is needed.
        taps: blocks whose outputs are read; -1 is the input of the first block.
        image: the image itself is read too.
    """

    first: int
    heads_only: bool
    taps: tuple[int, ...]
    image: bool


class _Switch:
    """What ``enable`` and ``disable`` return: as a context it puts the former state back at its end."""

    def __init__(self, handle: "Handle", was: bool):
        self.handle, self.was = handle, was

    def __enter__(self) -> "Handle":
        return self.handle

    def __exit__(self, *error) -> None:
        self.handle._switch(self.was)


class Handle:
    """An attached method. Get it from ``attach``, ``load``, or, on a copy of a model, from ``get_handle``.

    Attributes:
        model: the timm model.
        name: under which the method was attached.
        method: the method with its hyper-parameters.
        sites: what was read of the model.
    """

    def __init__(self, model: nn.Module, name: str):
        self.model, self.name = model, name
        self._root: Root | None = getattr(model, CONTAINER)._modules[name]

    @property
    def root(self) -> Root:
        if self._root is None:
            raise MethodError(f"'{self.name}' was detached")
        return self._root

    @property
    def method(self) -> Method:
        return self.root.method

    @property
    def sites(self) -> Sites:
        return self.root.sites

    @property
    def enabled(self) -> bool:
        """Whether the hooks act."""
        return self.root.enabled

    @property
    def merged(self) -> bool:
        return self.root.unmerged is not None

    # ---- tensors ----

    def state_dict(self) -> dict[str, Tensor]:
        """The method's tensors under the method cards' names, and tensors of the model it trains under their own.

        The head is not among them; ``save`` adds it.
        """
        state = dict(self.root.state_dict())  # parameters and persistent buffers
        for existing in self.root.existing:
            state |= existing.values()
        # While merged, a trained tensor of the model may hold a folded value.
        folded = {f"{place.path}.{n}": value for place, n, value in self.root.unmerged or ()}
        return state | {n: folded[n] for n in folded.keys() & state.keys() if folded[n] is not None}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], strict: bool = True) -> None:
        """Copy tensors in, by the names of ``state_dict``; the head's are taken too where they are given.

        Raises:
            CheckpointError: a missing or unknown name (where ``strict``) or a wrong shape; then nothing was changed.
        """
        if self.merged:
            raise MethodError(f"'{self.name}' is merged; unmerge() before loading other values")
        own = self.state_dict()
        heads = self.head_state_dict()
        missing = sorted(own.keys() - state.keys())
        unknown = sorted(state.keys() - own.keys() - heads.keys())
        if strict and (missing or unknown):
            parts = []
            if missing:
                parts.append(f"missing {_some(missing)}")
            if unknown:
                parts.append(f"unknown {_some(unknown)}{did_you_mean(unknown[0], missing) if missing else ''}")
            raise CheckpointError(f"tensors do not fit {self.method.name} on this model: {'; '.join(parts)}")
        known = own | heads
        resizable = {
            f"{path}.{leaf}".lstrip("."): (module, leaf)
            for path, module in self.root.named_modules()
            for leaf in getattr(module, "resizable", ())
        }
        for name, value in state.items():
            if name in resizable and value.ndim == known[name].ndim:
                continue
            if name in known and value.shape != known[name].shape:
                raise CheckpointError(
                    f"{name}: shape {tuple(value.shape)} in the file, {tuple(known[name].shape)} in the model"
                )
        for path, module in self.root.named_modules():
            if isinstance(module, Intervention) and module.resizable:
                names = {leaf: f"{path}.{leaf}".lstrip(".") for leaf in module.resizable}
                problem = module.why_not({leaf: state.get(n, known[n]) for leaf, n in names.items()})
                if problem:
                    raise CheckpointError(f"{path}: {problem}")
        existing = {n: e for e in self.root.existing for n in e.slots}
        self.root.calibrated = self.root.calibrated or not missing
        for name, value in state.items():
            if name in existing:
                existing[name].set_value(name, value)
            elif name in resizable and value.shape != known[name].shape:
                module, leaf = resizable[name]
                set_tensor(module, leaf, value)
            elif name in known:
                known[name].copy_(value)

    @property
    def heads(self) -> list[ModuleRef]:
        """What trains beside the method: the model's classifier(s), and modules outside it given to ``attach``."""
        return [*head_places(self.model), *(ModuleRef(name, module) for name, module in self.root.heads.items())]

    def head_state_dict(self) -> dict[str, Tensor]:
        """The heads' tensors: a classifier's under the model's names, others' under the names given to ``attach``."""
        return {
            f"{head.path}.{name}": value
            for head in self.heads
            for name, value in head.module.state_dict(keep_vars=False).items()
        }

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The method's parameters under the names of ``state_dict``; the head's are not among them.

        A parameter of no entries (a mask that chose none of a tensor's) is left out.
        """
        yield from ((n, p) for n, p in self.root.named_parameters() if p.numel())
        for existing in self.root.existing:
            yield from existing.tensors()

    def parameters(self) -> Iterator[nn.Parameter]:
        """See ``named_parameters``."""
        return (p for _, p in self.named_parameters())

    def head_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The heads' parameters, named as in ``head_state_dict``."""
        for head in self.heads:
            for name, parameter in head.module.named_parameters():
                yield f"{head.path}.{name}", parameter

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter that an optimiser should see: the method's and the head's that require gradients."""
        self._check_calibrated()
        for _, parameter in [*self.named_parameters(), *self.head_parameters()]:
            if parameter.requires_grad:
                yield parameter

    def _check_calibrated(self) -> None:
        if self.method.needs_calibration and not self.root.calibrated:
            raise MethodError(f"{self.method.name} looks at data first: call handle.calibrate(loader) before training")

    def param_groups(self, lr: float, weight_decay: float = 0.0, head_lr: float | None = None) -> list[dict[str, Any]]:
        """Parameter groups for a torch optimiser.

        Weight decay leaves alone what is a vector or a number (biases, norms, scales, gates), what the method exempts
        (prompts), what a head exempts (``no_decay``, as a method's modules have it) and what timm exempts (position
        embedding, class token).

        Args:
            lr: learning rate.
            weight_decay: of the other tensors.
            head_lr: learning rate of the heads; ``lr`` where None.
        """
        self._check_calibrated()
        exempt = set(getattr(self.model, "no_weight_decay", set)())
        heads = (pair for name, head in self.root.heads.items() for pair in head.named_modules(prefix=name))
        for path, module in [*self.root.named_modules(), *heads]:
            exempt |= {f"{path}.{name}".lstrip(".") for name in getattr(module, "no_decay", ())}
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for part, named in (("method", self.named_parameters()), ("head", self.head_parameters())):
            for name, p in named:
                if p.requires_grad:
                    decayed = p.ndim > 1 and name not in exempt
                    groups.setdefault((part, decayed), []).append(p)
        rates = {"method": lr, "head": lr if head_lr is None else head_lr}
        return [
            {"params": params, "lr": rates[part], "weight_decay": weight_decay if decayed else 0.0, "name": part}
            for (part, decayed), params in groups.items()
        ]

    def requires_grad_(self, value: bool = True) -> "Handle":
        """Let the method's parameters train or not (attaching a second method freezes the first)."""
        for parameter in self.parameters():
            parameter.requires_grad_(value)
        return self

    def train(self, mode: bool = True, backbone: bool = False) -> "Handle":
        """Training mode for what is trained; the frozen backbone stays in eval mode unless ``backbone`` is set.

        In eval mode the backbone's dropout and drop path are off, whatever the rates it was built with.
        """
        self.model.train(mode and backbone)
        self.root.train(mode)
        for head in self.heads:
            head.module.train(mode)
        return self

    def eval(self) -> "Handle":
        """Evaluation mode for everything."""
        return self.train(False)

    # ---- switching, merging, detaching ----

    def enable(self) -> _Switch:
        """Let the hooks act. ``with handle.enable():`` does so for a while.

        Raises:
            MethodError: another enabled method trains the same tensors of the model.
        """
        was = self.enabled
        self._switch(True)
        return _Switch(self, was)

    def disable(self) -> _Switch:
        """Make the model compute what the bare one does. ``with handle.disable():`` does so for a while."""
        was = self.enabled
        self._switch(False)
        return _Switch(self, was)

    def _switch(self, on: bool) -> None:
        root = self.root
        if on == root.enabled:
            return
        if self.merged:
            raise MethodError(f"'{self.name}' is merged into the weights; unmerge() before switching it")
        if on:
            mine = {name for i in root.interventions for name in i.owned_names()}
            for other in self._others():
                shared = mine & {name for i in other.interventions for name in i.owned_names()}
                if other.enabled and shared:
                    raise MethodError(f"'{other.name}' is enabled and has its own values of {_some(sorted(shared))}")
        root.enabled = on
        for intervention in root.interventions:
            intervention.on_toggle()
            intervention.enabled = on

    def _others(self) -> list[Root]:
        return [r for r in getattr(self.model, CONTAINER).children() if r.name != self.name]

    @property
    def mergeable(self) -> bool:
        """Whether ``merge`` is exact here."""
        return all(i.mergeable for i in self.root.interventions)

    @torch.no_grad()
    def merge(self) -> "Handle":
        """Fold the method into the backbone's weights, computed in float32 (or float64) and cast once.

        The hooks are off while merged; ``unmerge`` restores the original weights bit for bit.

        Raises:
            MethodError: already merged, switched off, not exactly mergeable (with the reason), or another enabled
                method acts on the same modules.
        """
        root = self.root
        if self.merged:
            raise MethodError(f"'{self.name}' is merged already")
        if not root.enabled:
            raise MethodError(f"'{self.name}' is disabled; enable() it before merging")
        for i in root.interventions:
            if not i.mergeable:
                i.fold()  # raises with the reason
        # All folds are computed before the first is written, so that a failure changes nothing.
        folds: list[Folded] = [f for i in root.interventions for f in i.fold()]
        touched = {id(f.place.module) for f in folds} | {id(p.module) for i in root.interventions for p in i.hooked()}
        for other in self._others():
            for place in (p for i in other.interventions if other.enabled for p in i.hooked()):
                if id(place.module) in touched:
                    raise MethodError(f"cannot merge '{self.name}': another enabled method also acts on {place.path}")
        seen: set[tuple[int, str]] = set()
        for fold in folds:
            for name in fold.tensors:
                if (id(fold.place.module), name) in seen:
                    raise MethodError(f"cannot merge: two parts of {self.method.name} change {fold.place.path}.{name}")
                seen.add((id(fold.place.module), name))
        root.unmerged = []
        for fold in folds:
            for name, value in fold.tensors.items():
                current = getattr(fold.place.module, name)
                root.unmerged.append((fold.place, name, None if current is None else current.detach().clone()))
                if current is None:
                    like = fold.place.module.weight
                    new = nn.Parameter(value.to(like.device, like.dtype), requires_grad=False)
                    setattr(fold.place.module, name, new)
                else:
                    current.copy_(value)
        for intervention in root.interventions:
            if not isinstance(intervention, ExistingTensors):
                intervention.enabled = False
        return self

    @torch.no_grad()
    def unmerge(self) -> "Handle":
        """Put the original weights back, bit for bit, and let the hooks act again.

        Raises:
            MethodError: not merged.
        """
        root = self.root
        if root.unmerged is None:
            raise MethodError(f"'{self.name}' is not merged")
        for place, name, value in reversed(root.unmerged):
            if value is None:
                setattr(place.module, name, None)
            else:
                getattr(place.module, name).copy_(value)
        root.unmerged = None
        for intervention in root.interventions:
            intervention.enabled = True
        return self

    def detach(self, keep_merged: bool = False) -> nn.Module:
        """Take the method off: hooks, modules and flags go, original values return; the model is returned.

        Args:
            keep_merged: leave the folded weights (or, of a method that trains the model's own tensors, the trained
                ones) in place, which gives a plain timm model to export. CacheNeeds ``merge`` first.

        Raises:
            MethodError: already detached, or ``keep_merged`` without ``merge``.
        """
        root = self.root
        if keep_merged and not self.merged:
            raise MethodError("detach(keep_merged=True): merge() first")
        if not keep_merged:
            if self.merged:
                self.unmerge()
            if root.enabled:
                self._switch(False)  # original values of trained tensors
        _remove(self.model, self.name)
        self._root = None
        return self.model

    # ---- what it is ----

    @property
    def boundary(self) -> str:
        """Path of the first module, in forward order, that a gradient must reach; below it nothing needs a graph."""
        positions = [i.position for i in self._acting()]
        if not positions:
            return next((h.path for h in self.sites.heads), "head")
        return self.sites.boundary(min(positions))

    @property
    def cache_needs(self) -> CacheNeeds:
        """What of the frozen features the method needs, for a cache of them."""
        parts, depth = self._acting(), len(self.sites.blocks)
        taps = {t for i in parts for t in i.taps()}
        first = min([depth, *(i.runs_from for i in parts)])
        return CacheNeeds(first, not parts, tuple(sorted(t for t in taps if IMAGE < t < first)), IMAGE in taps)

    def _acting(self) -> list[Intervention]:
        """The interventions that train or change something, or read features."""
        return [i for i in self.root.interventions if i.taps() or not i.inert]

    def calibrate(
        self,
        loader: Iterable,
        *,
        outer: nn.Module | None = None,
        criterion: Criterion | None = None,
        progress: bool = True,
    ) -> "Handle":
        """Let the method look at data before training, where it needs to (masks, clusters, label maps, pruned starts).

        What it finds is part of ``state_dict`` and of the file. Make the optimiser afterwards: a method may choose here
        which numbers it trains. A method that has nothing to look for does nothing.

        Args:
            loader: yields (images, labels) of the training split, as the model takes them.
            outer: the module that the task calls, where that is not the model itself but one around it.
            criterion: ``(outer, images, labels) -> mean loss`` of the task; cross-entropy of the logits where None.
            progress: show a bar.

        Raises:
            MethodError: merged or disabled, or an empty loader.
        """
        if not callable(getattr(self.method, "calibrate", None)):
            return self
        if self.merged or not self.enabled:
            raise MethodError(f"'{self.name}' must be enabled and not merged to be calibrated")
        device = next(self.model.parameters()).device
        training = {m: m.training for m in (self.model if outer is None else outer).modules()}
        try:
            self.root.calibrated = False
            self.root.objective = Objective(self.model, self.root.heads, outer, criterion)
            self.method.calibrate(self, _Batches(loader, device, self.name if progress else None))
            self.root.calibrated = True
        finally:
            self.root.objective = None
            for module, mode in training.items():
                module.training = mode
            for parameter in (*self.model.parameters(), *(p for _, p in self.head_parameters())):
                parameter.grad = None
        return self

    @property
    def objective(self) -> Objective:
        """The task's loss, for a method's own ``calibrate``."""
        return self.root.objective or Objective(self.model, self.root.heads)

    def penalty(self) -> Tensor:
        """What the method adds to the task's loss (a number; 0 for most), from its present parameters."""
        value = self.method.penalty(self)
        return torch.zeros((), device=next(self.model.parameters()).device) if value is None else value

    def consistency_loss(self, first: Tensor, second: Tensor) -> Tensor:
        """What the method adds to a step's loss for two runs' logits (B, C) on one batch; 0 for most methods."""
        value = self.method.step_loss(first, lambda: second)
        return first.new_zeros(()) if value is None else value

    @torch.no_grad()
    def after_step(self) -> None:
        """To be called after each ``optimizer.step()``, before gradients are cleared; few methods do anything here."""
        self.method.after_step(self)

    def summary(self) -> str:
        """Sites, parameters, properties and paper, as text for people."""
        root, method = self.root, self.method
        own = sum(p.numel() for p in self.parameters())
        head = sum(p.numel() for _, p in self.head_parameters()) if method.trains_head else 0
        inside = sum(p.numel() for n, p in self.model.named_parameters() if not n.startswith(f"{CONTAINER}."))
        added = sum(p.numel() for p in root.parameters())
        total = inside + added
        merge = "yes" if self.mergeable else "no"
        state = "merged" if self.merged else ("enabled" if root.enabled else "disabled")
        options = ", ".join(f"{k}={v!r}" for k, v in method.options().items())
        lines = [
            f"{self.name}: {method.name}({options}) on {_model_name(self.model)}, {state}",
            f"  paper      {method.paper}",
            f"  trainable  {own:,} + {head:,} in the head, of {total:,} ({100 * (own + head) / max(total, 1):.2f} %)",
            *(f"  {title:10} {text}" for title, text in method.notes(self)),
            f"  mergeable  {merge}",
            f"  gradient   reaches back to {self.boundary}",
            "  sites",
        ]
        return "\n".join(lines + [f"    {line}" for line in _sites_table(root)])

    def __repr__(self) -> str:
        if self._root is None:
            return f"{self.name}: detached"
        return self.summary()

    # ---- files ----

    def save(
        self,
        path: str | Path,
        *,
        class_names: Iterable[str] | None = None,
        metrics: dict[str, float] | None = None,
        data: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        training: bool = False,
    ) -> Path:
        """Write what was trained, and the head, as safetensors with everything needed to rebuild it.

        Args:
            path: of the file.
            class_names: in the order of the head's outputs.
            metrics: what was measured.
            data: preprocessing, where it differs from the model's own pretrained_cfg.
            config: the experiment.
            training: keep the form it has in training, where the method would save a simpler one.

        Raises:
            MethodError: merged at the moment.
        """
        if self.merged:
            raise MethodError(f"'{self.name}' is merged into the weights; unmerge() before saving")
        with self.enable():
            return checkpoint.save(self, Path(path), class_names, metrics, data, config, training)
