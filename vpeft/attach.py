"""``attach`` a method to a timm model, and the handle that everything else is done with."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from . import checkpoint
from .errors import CheckpointError, MethodError, UnsupportedModelError, VpeftError, did_you_mean
from .interventions import IMAGE, ExistingTensors, Folded, Intervention, clips, set_tensor
from .methods.base import Method, create
from .sites import Place, Sites, head_places, needs_separate_bias_call, prove_alive

CONTAINER = "vpeft"
Criterion = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Needs:
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


class Root(nn.Module):
    """All that one attached method brought to a model: a tree of modules whose names are the method cards' names."""

    def __init__(self, name: str, method: Method, sites: Sites):
        super().__init__()
        self.name, self.method, self.sites = name, method, sites
        self.enabled = True
        self.calibrated = False
        # Modules outside the model that train with it. A plain dict: they are no part of the model's tree.
        self.heads: dict[str, nn.Module] = {}
        # What calibration measures the method by; only while it lasts.
        self.objective: Objective | None = None
        # While merged: what each folded module held before, as (place, tensor's name, value or None).
        self.unmerged: list[tuple[Place, str, Tensor | None]] | None = None

    def plant(self, path: str, module: nn.Module) -> None:
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
    def interventions(self) -> list[Intervention]:
        return [m for m in self.modules() if isinstance(m, Intervention)]

    @property
    def existing(self) -> list[ExistingTensors]:
        return [m for m in self.interventions if isinstance(m, ExistingTensors)]

    def forward(self) -> None:
        raise VpeftError("this module holds hooks; call the model itself")


class Container(nn.Module):
    """``model.vpeft``: the attached methods by name, and what ``detach`` has to put back."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        # Attentions that were told to call their own qkv module.
        self.told: list[Place] = []


class Objective:
    """The task's loss as calibration sees it: of the model, or of what the model is a part of, on one batch.

    Args:
        model: the timm model.
        outer: the module that the task calls; ``model`` or one that holds it.
        criterion: ``(outer, images, labels) -> mean loss``; cross-entropy of its logits where None.
    """

    def __init__(self, model: nn.Module, outer: nn.Module | None = None, criterion: Criterion | None = None):
        self.outer, self.criterion = model if outer is None else outer, criterion
        paths = [path for path, module in self.outer.named_modules() if module is model]
        if not paths:
            raise MethodError("calibrate: the module that the task calls does not hold the model")
        self.prefix = f"{paths[0]}." if paths[0] else ""

    def loss(self, images: Tensor, labels: Tensor, tensors: dict[str, Tensor] | None = None) -> Tensor:
        """Mean loss of a batch, with ``tensors`` in place of the model's own of these names."""
        call = _Loss(self.outer, self.criterion)
        values = {f"outer.{self.prefix}{name}": value for name, value in (tensors or {}).items()}
        return functional_call(call, values, (images, labels))

    def forward(self, images: Tensor) -> Any:
        """What the task's module gives for a batch."""
        return self.outer(images)

    def need_classifier(self, what: str) -> None:
        """Refuse another task than that of classifying the model's own images.

        Raises:
            MethodError: names what needs it.
        """
        if self.criterion is not None or self.prefix:
            raise MethodError(f"{what} looks at one class label for each image; this task has none")


class _Loss(nn.Module):
    def __init__(self, outer: nn.Module, criterion: Criterion | None):
        super().__init__()
        self.outer, self.criterion = outer, criterion

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.criterion is None:
            return F.cross_entropy(self.outer(images).float(), labels)
        return self.criterion(self.outer, images, labels)


class _Batches:
    """A loader's batches on the model's device, under a progress bar; can be gone through several times."""

    def __init__(self, loader: Iterable, device: torch.device, title: str | None):
        self.loader, self.device, self.title = loader, device, title

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self.loader
        if self.title is not None:
            from rich.progress import track

            total = len(self.loader) if hasattr(self.loader, "__len__") else None
            batches = track(self.loader, f"calibrating {self.title}", total=total, transient=True)
        count = 0
        for images, labels in batches:
            count += 1
            yield images.to(self.device), labels.to(self.device)
        if not count:
            raise MethodError("calibrate: the loader gave no batch")


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
        flexible = {
            f"{path}.{leaf}".lstrip("."): (module, leaf)
            for path, module in self.root.named_modules()
            for leaf in getattr(module, "flexible", ())
        }
        for name, value in state.items():
            if name in flexible and value.ndim == known[name].ndim:
                continue
            if name in known and value.shape != known[name].shape:
                raise CheckpointError(
                    f"{name}: shape {tuple(value.shape)} in the file, {tuple(known[name].shape)} in the model"
                )
        for path, module in self.root.named_modules():
            if isinstance(module, Intervention) and module.flexible:
                names = {leaf: f"{path}.{leaf}".lstrip(".") for leaf in module.flexible}
                problem = module.misfit({leaf: state.get(n, known[n]) for leaf, n in names.items()})
                if problem:
                    raise CheckpointError(f"{path}: {problem}")
        existing = {n: e for e in self.root.existing for n in e.slots}
        self.root.calibrated = self.root.calibrated or not missing
        for name, value in state.items():
            if name in existing:
                existing[name].set_value(name, value)
            elif name in flexible and value.shape != known[name].shape:
                module, leaf = flexible[name]
                set_tensor(module, leaf, value)
            elif name in known:
                known[name].copy_(value)

    @property
    def heads(self) -> list[Place]:
        """What trains beside the method: the model's classifier(s), and modules outside it given to ``attach``."""
        return [*head_places(self.model), *(Place(name, module) for name, module in self.root.heads.items())]

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
        (prompts) and what timm exempts (position embedding, class token).

        Args:
            lr: learning rate.
            weight_decay: of the other tensors.
            head_lr: learning rate of the heads; ``lr`` where None.
        """
        self._check_calibrated()
        exempt = set(getattr(self.model, "no_weight_decay", set)())
        for path, module in self.root.named_modules():
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
            mine = {name for i in root.interventions for name in i.claims()}
            for other in self._others():
                shared = mine & {name for i in other.interventions for name in i.claims()}
                if other.enabled and shared:
                    raise MethodError(f"'{other.name}' is enabled and has its own values of {_some(sorted(shared))}")
        root.enabled = on
        for intervention in root.interventions:
            intervention.swap()
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
        touched = {id(f.place.module) for f in folds} | {id(p.module) for i in root.interventions for p in i.places()}
        for other in self._others():
            for place in (p for i in other.interventions if other.enabled for p in i.places()):
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
                ones) in place, which gives a plain timm model to export. Needs ``merge`` first.

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
    def needs(self) -> Needs:
        """What of the frozen features the method needs, for a cache of them."""
        parts, depth = self._acting(), len(self.sites.blocks)
        taps = {t for i in parts for t in i.taps()}
        first = min([depth, *(i.runs_from for i in parts)])
        return Needs(first, not parts, tuple(sorted(t for t in taps if IMAGE < t < first)), IMAGE in taps)

    def _acting(self) -> list[Intervention]:
        """The interventions that train or change something, or read features."""
        return [i for i in self.root.interventions if i.taps() or not i.passive]

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
            self.root.objective = Objective(self.model, outer, criterion)
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
        return self.root.objective or Objective(self.model)

    def penalty(self) -> Tensor:
        """What the method adds to the task's loss (a number; 0 for most), from its present parameters."""
        value = self.method.penalty(self)
        return torch.zeros((), device=next(self.model.parameters()).device) if value is None else value

    def consistency_loss(self, first: Tensor, second: Tensor) -> Tensor:
        """Symmetric Kullback-Leibler divergence of two runs' logits (B, C), mean over the batch, times its weight."""
        a, b = first.float().log_softmax(-1), second.float().log_softmax(-1)
        divergence = F.kl_div(a, b, log_target=True, reduction="batchmean")
        divergence = divergence + F.kl_div(b, a, log_target=True, reduction="batchmean")
        return self.method.consistency_weight * divergence

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


def attach(
    model: nn.Module,
    method: str | Method | type[Method],
    *,
    name: str | None = None,
    heads: Mapping[str, nn.Module] | None = None,
    **options: Any,
) -> Handle:
    """Attach a method to a timm model through hooks; freeze all but the method's parameters and the head.

    The model keeps its class, its forward and every name. A method attached earlier stays, disabled and frozen.

    Args:
        model: a timm ViT, Swin or relative (see ``sites.py``).
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
    method = create(method, **options)
    _check_wrapper(model)
    name = name or method.name
    if not name.isidentifier():
        raise MethodError(f"name: '{name}' must be letters, digits and underscores")
    _check_heads(model, heads or {})
    earlier = getattr(model, CONTAINER, None)
    if earlier is not None and name in earlier._modules:
        raise MethodError(f"'{name}' is attached already; give name=…, or detach it")
    enabled = [Handle(model, n) for n, r in earlier.named_children() if r.enabled] if earlier is not None else []
    for handle in enabled:
        if handle.merged:
            raise MethodError(f"'{handle.name}' is merged into the weights; unmerge() or detach() it first")
    for handle in enabled:
        handle.disable()
    frozen = {n: p.requires_grad for n, p in model.named_parameters()}
    try:
        sites = Sites(model)
        root = _build(name, method, sites)
        if earlier is None:
            model.add_module(CONTAINER, Container(model))
        container = getattr(model, CONTAINER)
        container.add_module(name, root)
        model.requires_grad_(False)
        for parameter in root.parameters():
            parameter.requires_grad_(parameter.numel() > 0)
        for head in sites.heads:
            head.module.requires_grad_(method.trains_head)
        for intervention in root.interventions:
            intervention.install()
            for place in intervention.calls_needed():
                if needs_separate_bias_call(place.module):
                    place.module.qkv_bias_separate = True
                    container.told.append(place)
        root.heads = dict(heads or {})
        root.train(model.training)
        places = [p for i in root.interventions for p in i.places()]
        with _named(method, model), clips(model, 1):  # one image is a clip of one frame
            prove_alive(model, places, sites.input_size)
    except BaseException:
        if getattr(model, CONTAINER, None) is not None and name in getattr(model, CONTAINER)._modules:
            _remove(model, name)
        for n, parameter in model.named_parameters():
            parameter.requires_grad_(frozen[n])
        for handle in enabled:
            handle.enable()
        raise
    return Handle(model, name)


def get_handle(model: nn.Module, name: str | None = None) -> Handle:
    """The handle of an attached method, e.g. on a deepcopy of the model.

    Args:
        model: the model.
        name: the method's; None where only one is attached.

    Raises:
        MethodError: nothing of that name is attached.
    """
    container = getattr(model, CONTAINER, None)
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
    file = checkpoint.read(Path(path))
    if check_backbone:
        checkpoint.check_backbone(model, file)
    head_tensors = {n: t for n, t in file.tensors.items() if n in file.head_names} if head else {}
    try:
        method = create(file.about["method"]["name"], **file.about["method"]["options"])
    except VpeftError as error:
        raise CheckpointError(f"{path}: its method cannot be rebuilt here: {error}") from error
    outside = tuple(f"{n}." for n in heads or {})
    # First the classifier: a method may hook it.
    undo = _fit_classifier(model, {n: t for n, t in head_tensors.items() if not n.startswith(outside)})
    handle = None
    try:
        handle = attach(model, method, name=name or file.about["name"], heads=heads)
        handle.load_state_dict({n: t for n, t in file.tensors.items() if n not in file.head_names})
        current = handle.head_state_dict()
        found, wanted = ({n: tuple(t.shape) for n, t in tensors.items()} for tensors in (current, head_tensors))
        if wanted and found != wanted:
            raise CheckpointError(f"{path}: its heads do not fit the model's: {_head_differences(wanted, found)}")
        with torch.no_grad():
            for n, t in head_tensors.items():
                current[n].copy_(t)
    except BaseException:
        if handle is not None:
            handle.detach()
        undo()
        raise
    return handle


# ---- helpers ----


def _build(name: str, method: Method, sites: Sites) -> Root:
    root = Root(name, method, sites)
    like = next(p for p in sites.model.parameters() if p.is_floating_point())
    count = 0
    with _named(method, sites.model), torch.random.fork_rng(devices=[], enabled=like.is_meta):
        for path, module in method.build(sites):
            module.to(device=like.device, dtype=like.dtype)
            root.plant(path, module)
            count += 1
    if not count:
        raise MethodError(f"{method.name}: these hyper-parameters choose no place to act on")
    return root


class _named:
    """Adds the method's and the model's names to an error."""

    def __init__(self, method: Method, model: nn.Module):
        self.text = f"{method.name} on {_model_name(model)}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, UnsupportedModelError):
            raise UnsupportedModelError(f"{self.text}: {error}") from error


def _check_heads(model: nn.Module, heads: Mapping[str, nn.Module]) -> None:
    inside = {id(module) for module in model.modules()}
    for name, module in heads.items():
        if not isinstance(module, nn.Module):
            raise MethodError(f"heads: '{name}' is no module but {type(module).__name__}")
        if id(module) in inside:
            raise MethodError(f"heads: '{name}' is part of the model; the model's own classifier trains without being named")
        if not name.isidentifier() or hasattr(model, name):
            raise MethodError(f"heads: '{name}' must be letters, digits and underscores, and no name in the model")


def _head_differences(wanted: dict[str, tuple], found: dict[str, tuple]) -> str:
    """What a file's heads have that the model's have not, or in another shape."""
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    both = sorted(wanted.keys() & found.keys())
    parts = [f"{n} is {wanted[n]} in the file, {found[n]} here" for n in both if wanted[n] != found[n]]
    if missing:
        parts.append(f"{_some(missing)} only in the file (give load the modules that were trained: heads=…)")
    if unknown:
        parts.append(f"{_some(unknown)} not in the file")
    return "; ".join(parts)


def _check_wrapper(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a timm model, got {type(model).__name__}")
    for wrapper, inner in (("OptimizedModule", "_orig_mod"), ("DistributedDataParallel", "module")):
        if type(model).__name__ == wrapper:
            raise UnsupportedModelError(
                f"the model is wrapped in {wrapper}; attach to the model inside (.{inner}) and wrap it afterwards"
            )


def _model_name(model: nn.Module) -> str:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    name, tag = cfg.get("architecture"), cfg.get("tag")
    if not name:
        return type(model).__name__
    return f"{name}.{tag}" if tag else name


def _remove(model: nn.Module, name: str) -> None:
    """Take one method's hooks, overrides and modules off a model, whatever state it is in."""
    container = getattr(model, CONTAINER)
    for intervention in container._modules[name].interventions:
        intervention.uninstall()
    mine = {id(m) for m in container._modules[name].modules()}
    for module in model.modules():
        for table in (module._forward_hooks, module._forward_pre_hooks):
            for key in [k for k, hook in table.items() if id(getattr(hook, "__self__", None)) in mine]:
                del table[key]
                for flags in ("_forward_hooks_with_kwargs", "_forward_hooks_always_called",
                              "_forward_pre_hooks_with_kwargs"):  # fmt: skip
                    getattr(module, flags).pop(key, None)
        for key in [k for k, v in vars(module).items() if id(getattr(v, "__self__", None)) in mine]:
            delattr(module, key)
    del container._modules[name]
    needed = {id(p.module) for root in container.children() for i in root.interventions for p in i.calls_needed()}
    for place in [p for p in container.told if id(p.module) not in needed]:
        place.module.qkv_bias_separate = False
        container.told.remove(place)
    if not container._modules:
        for n, parameter in model.named_parameters():
            parameter.requires_grad_(container.required_grad.get(n, True))
        delattr(model, CONTAINER)


def _fit_classifier(model: nn.Module, tensors: dict[str, Tensor]) -> Callable[[], None]:
    """Give the model a classifier of as many outputs as in a file, where its own has others; returns what undoes it."""
    wanted = {n: t.shape[0] for n, t in tensors.items() if n.endswith(("bias", "weight"))}
    heads = head_places(model)
    have = {f"{h.path}.{n}": t.shape[0] for h in heads for n, t in h.module.state_dict().items() if n in ("bias", "weight")}
    if not wanted or have == wanted:
        return lambda: None
    return _reset_classifier(model, next(iter(wanted.values())))


def _reset_classifier(model: nn.Module, classes: int) -> Callable[[], None]:
    """timm's ``reset_classifier``; returns a function that puts the former one back."""
    heads = {h.path: h.module for h in head_places(model)} or {
        n: getattr(model, n) for n in ("head", "head_dist") if isinstance(getattr(model, n, None), nn.Identity)
    }
    count = getattr(model, "num_classes", None)

    def put_back() -> None:
        model.reset_classifier(count)
        for path, module in heads.items():
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module)

    like = next(p for p in model.parameters() if p.is_floating_point())
    model.reset_classifier(classes)
    for head in head_places(model):
        head.module.to(device=like.device, dtype=like.dtype)
        head.module.requires_grad_(True)
    return put_back


def _sites_table(root: Root) -> list[str]:
    """One line per kind of site, with how often it stands."""
    groups: dict[str, list[int]] = {}
    for path, module in root.named_modules():
        if isinstance(module, ExistingTensors):
            if module.slots:
                count = sum(math.prod(p.shape) for _, p in module.tensors())
                groups[f"{len(module.slots)} tensors of the model"] = [1, count]
        elif isinstance(module, Intervention):
            kind = ".".join("*" if p.isdigit() else p for p in path.split("."))
            entry = groups.setdefault(kind, [0, 0])
            entry[0] += 1
            entry[1] += sum(p.numel() for p in module.parameters())
    return [f"{kind} x{n}: {count:,} parameters" for kind, (n, count) in groups.items()] or ["none but the head"]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
