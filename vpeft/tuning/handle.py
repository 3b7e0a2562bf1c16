"""The handle of an attached method."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import checkpoint
from ..attached.objective import Batches, Criterion, Objective
from ..attached.tree import Tree
from ..backbone.modules import ModuleRef
from ..backbone.sites import Sites
from ..errors import MethodError
from ..files import as_path, naming, writable_file
from ..methods.base import Method
from ..numerics import kept_modes
from ..shards import gathered, reshard, wholes
from . import merging, stepping
from .beside import check_together
from .container import Container, container_of, originals_of, remove
from .needs import CacheNeeds, boundary, cache_needs, check_calibrated
from .summary import summary


class _Switch:
    """What ``enable`` and ``disable`` return. In a ``with`` statement it restores the former state at the end."""

    def __init__(self, handle: "Handle"):
        self.handle, self.was = handle, handle.enabled
        self.order, self.there = list(handle._container.enabled_order), set(handle._container.trees)

    def __enter__(self) -> "Handle":
        return self.handle

    def __exit__(self, *error) -> None:
        container = self.handle._container
        if container is None or not self.handle._there or set(container.trees) - self.there:
            return  # it was detached, or another one was attached, whose turn it is
        self.handle._switch(self.was)
        enabled = container.enabled_order  # someone else may have been switched meanwhile
        container.enabled_order = [n for n in enabled if n not in self.order] + [n for n in self.order if n in enabled]
        container.put_classifier()


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
        self._root: Tree | None = container_of(model)._modules[name]

    @property
    def root(self) -> Tree:
        """The method's modules, and what belongs to them."""
        if self._root is None or not self._there:
            raise MethodError(f"'{self.name}' was detached")
        return self._root

    @property
    def _there(self) -> bool:
        container = container_of(self.model)  # another handle of the same method may have detached it
        return container is not None and container._modules.get(self.name) is self._root

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
        """The method's tensors, named as in its file, and tensors of the model that it trains, under the model's names.

        The head is not among them; ``save`` adds it. Of a model in shards (FSDP2) they are whole: call it in every process.
        """
        return wholes(self.root.state())

    def load_state_dict(self, state: dict[str, Tensor], strict: bool = True) -> None:
        """Copy tensors in, by the names of ``state_dict``; the head's are taken too where they are given.

        Floating-point values are converted to the type that the tensor has here.

        Raises:
            CheckpointError: a missing or unknown name (where ``strict``), no plain tensor, a wrong shape, or a type that
                does not convert (whole numbers, truth values, complex numbers); then nothing was changed.
        """
        if self.merged:
            raise MethodError(f"'{self.name}' is merged; unmerge() before loading other values")
        self.root.load(state, strict)

    @property
    def heads(self) -> list[ModuleRef]:
        """What trains beside the method: a classifier of its own, and the modules outside the model given to ``attach``.

        The classifier is in the model while this handle is the one that was enabled last; else it waits outside.
        """
        return self.root.head_places

    def head_state_dict(self) -> dict[str, Tensor]:
        """The heads' tensors: a classifier's under the model's names, others' under the names given to ``attach``."""
        return wholes(self.root.head_tensors())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The method's parameters under the names of ``state_dict``; the head's are not among them.

        A parameter of no entries (a mask that chose none of a tensor's) is left out.
        """
        return self.root.trained()

    def parameters(self) -> Iterator[nn.Parameter]:
        """See ``named_parameters``."""
        return (p for _, p in self.named_parameters())

    def head_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The heads' parameters, named as in ``head_state_dict``."""
        return self.root.head_parameters()

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter that an optimiser should see: the method's and the head's that require gradients."""
        check_calibrated(self.root)
        stepping.check_units(self.root)
        for _, parameter in [*self.named_parameters(), *self.head_parameters()]:
            if parameter.requires_grad:
                yield parameter

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
        check_calibrated(self.root)
        stepping.check_units(self.root)
        return stepping.param_groups(self.root, lr, weight_decay, head_lr)

    def requires_grad_(self, value: bool = True) -> "Handle":
        """Let the method's parameters train or not; while it is disabled, once it is enabled again."""
        self.root.let_train(value)
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
        """Let the hooks act, and train what trained before. ``with handle.enable():`` does so for a while.

        Raises:
            MethodError: it cannot act beside another enabled method; names the place and the reason.
        """
        before = _Switch(self)
        self._switch(True)
        return before

    def disable(self) -> _Switch:
        """Make the model compute what the bare one does; nothing of the method trains meanwhile.

        ``with handle.disable():`` does so for a while.
        """
        before = _Switch(self)
        self._switch(False)
        return before

    def _switch(self, on: bool) -> None:
        root, container = self.root, self._container
        if on == root.enabled:
            return
        if self.merged:
            raise MethodError(f"'{self.name}' is merged into the weights; unmerge() before switching it")
        if on:
            others = self._others()
            acting = [*(t for t in others if t.enabled and t.unmerged is None), root]
            check_together(acting, self.name, [t for t in others if t.unmerged is not None])
        root.switch(on)
        container.enabled_order = [name for name in container.enabled_order if name != self.name] + [self.name] * on
        container.put_classifier()

    @property
    def _container(self) -> Container:
        return container_of(self.model)

    def _others(self) -> list[Tree]:
        return [tree for name, tree in self._container.trees.items() if name != self.name]

    @property
    def mergeable(self) -> bool:
        """Whether ``merge`` is exact here."""
        return all(i.mergeable for i in self.root.interventions)

    def merge(self, partial: bool = False) -> "Handle":
        """Fold the method into the backbone's weights, computed in float32 (or float64) and cast once.

        The hooks are off while merged; ``unmerge`` restores the original weights bit for bit. With ``partial`` the parts
        that fold exactly do so (LoRA beside prompts), and the others act on.

        Raises:
            MethodError: already merged, switched off, not exactly mergeable (with the reason), or another enabled
                method, or a part that does not fold, acts on the same modules.
        """
        merging.merge(self.root, self._others(), partial)
        return self

    def unmerge(self) -> "Handle":
        """Put the original weights back, bit for bit, and let the hooks act again.

        Raises:
            MethodError: not merged.
        """
        merging.unmerge(self.root)
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
        if keep_merged and (not self.merged or root.folded):
            raise MethodError("detach(keep_merged=True): merge() first, and not in part")
        if keep_merged:
            self._container.own_classifier = root.classifier
        else:
            if self.merged:
                self.unmerge()
            self._switch(False)  # original values of trained tensors
        remove(self.model, self.name)
        self._root = None
        return self.model

    # ---- what it is ----

    @property
    def boundary(self) -> str:
        """Path of the first module, in forward order, that a gradient must reach; below it nothing needs a graph."""
        return boundary(self.root)

    @property
    def cache_needs(self) -> CacheNeeds:
        """What of the frozen features the method needs, for a cache of them."""
        return cache_needs(self.root)

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
            MethodError: merged or disabled; in shards, where the method does not look at data in every epoch; or the loader
                is empty or gives something else than images with labels. The handle is then as before.
        """
        if not callable(getattr(self.method, "calibrate", None)):
            return self
        if reshard(self.model) and not self.method.calibrates_each_epoch:
            raise MethodError(f"'{self.name}': calibrate before fully_shard (or accelerator.prepare)")
        if self.merged or not self.enabled:
            raise MethodError(f"'{self.name}' must be enabled and not merged to be calibrated")
        device, was, done = next(self.model.parameters()).device, self.root.calibrated, False
        try:
            self.root.task = Objective(self.model, self.root.heads, outer, criterion)
            batches = Batches(loader, device, self.name if progress else None, self.root.task)
            with kept_modes(self.model if outer is None else outer), self._container.bring_forward(self.name):
                self.method.calibrate(self.root, batches)
            done = True
        finally:
            self.root.calibrated = done or was
            self.root.task = None
            for parameter in (*self.model.parameters(), *(p for _, p in self.head_parameters())):
                parameter.grad = None
        return self

    @property
    def objective(self) -> Objective:
        """The task's loss, for a method's own ``calibrate``."""
        return self.root.objective

    def penalty(self) -> Tensor:
        """What the method adds to the task's loss (a number; 0 for most), from its present parameters."""
        return stepping.penalty(self.root)

    def consistency_loss(self, first: Tensor, second: Tensor) -> Tensor:
        """What the method adds to a step's loss for two runs' logits (B, C) on one batch; 0 for most methods."""
        value = self.method.step_loss(first, lambda: second)
        return first.new_zeros(()) if value is None else value

    def after_step(self) -> None:
        """To be called after each ``optimizer.step()``, before gradients are cleared; few methods do anything here."""
        stepping.after_step(self.root)

    def summary(self) -> str:
        """Sites, parameters, properties and paper, as text for people."""
        merged = "merged in part" if self.root.folded else "merged"
        state = merged if self.merged else ("enabled" if self.enabled else "disabled")
        return summary(self.root, self.boundary, self.mergeable, state)

    def __repr__(self) -> str:
        if self._root is None or not self._there:
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

        Of a model in shards (FSDP2) call it in every process; the first one writes.

        Args:
            path: of the file.
            class_names: in the order of the head's outputs; a name may stand there twice.
            metrics: what was measured, as numbers of Python, NumPy or torch; None is written where one is not finite.
            data: preprocessing, where it differs from the model's own pretrained_cfg.
            config: the experiment, as values that JSON has.
            training: keep the form it has in training, where the method would save a simpler one.

        Raises:
            MethodError: merged at the moment.
            CheckpointError: no file can be at this path, or what is to be said in it does not fit; nothing was written.
        """
        if self.merged:
            raise MethodError(f"'{self.name}' is merged into the weights; unmerge() before saving")
        stepping.check_units(self.root)
        # In shards the first process alone looks at the place: one that fails by itself would leave the others waiting.
        file, head = as_path(path) if reshard(self.model) else writable_file(path), self.head_state_dict()
        with naming(file):
            described = checkpoint.describe(class_names, metrics, data, config)
            described |= {"num_classes": self.root.classifier.num_classes, "calibrated": self.root.calibrated}
            self.root.check_class_names(described["class_names"])
            with gathered(self.root, self.model):
                method, own = (self.method, self.root.state()) if training else self.method.exported(self.root)
            originals = originals_of(self._others())
            checkpoint.save(file, self.name, method, self.model, own, head, described, originals)
        self.root.class_names = described["class_names"]
        return file
