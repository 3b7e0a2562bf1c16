"""Masks found by training: LT-SFT (Ansell et al., ACL 2022) and diff pruning (Guo et al., ACL 2021, arXiv 2012.07463).

Both have two phases. The first one trains every tensor; ``handle.calibrate`` runs it on copies, so that the model and
its head stay as they were, and keeps the mask. The second phase is the usual training, of the chosen entries.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..attached.tree import Tree
from ..errors import MethodError
from ..options import fraction, nonnegative, option
from .base import Paper, register
from .masks import Masked, largest, masked_parts

Tensors = dict[str, Tensor]


def copies(tree: Tree) -> tuple[Tensors, Tensors]:
    """The masked tensors as they are in the model, and trainable copies of the head's."""
    live = dict(tree.model.named_parameters())
    head = {n: p.detach().clone().requires_grad_() for n, p in tree.head_parameters()}
    return {n: live[n].detach() for n in masked_parts(tree)}, head


def dense_phase(
    tree: Tree,
    batches,
    epochs: int,
    weights: Callable[[], Tensors],
    groups: list[tuple[list[Tensor], float]],
    penalty: Callable[[], Tensor] | None = None,
) -> None:
    """AdamW without decay on the task's loss of the model with ``weights()`` in it, in training mode.

    Learning rates fall linearly from pass to pass; each group's gradient is cut to norm 1.

    Args:
        tree: of the method, which must be switched off.
        batches: of the training set, gone through once per epoch.
        epochs: how often.
        weights: the model's tensors by name, computed from those that are trained.
        groups: the trained tensors, with their learning rates.
        penalty: added to the loss.
    """
    tree.model.train()
    optimizer = torch.optim.AdamW([{"params": tensors, "lr": lr} for tensors, lr in groups], weight_decay=0.0)
    for epoch in range(epochs):
        for group, (_, lr) in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = lr * (1 - epoch / epochs)
        for images, labels in batches:
            loss = tree.objective.loss(images, labels, weights())
            if penalty is not None:
                loss = loss + penalty()
            optimizer.zero_grad()
            loss.backward()
            for tensors, _ in groups:
                torch.nn.utils.clip_grad_norm_(tensors, 1.0)
            optimizer.step()
        if not torch.isfinite(loss):
            raise MethodError(f"{tree.method.name}.lr: the loss of the dense phase is {loss.item()}; lower it")


@register(
    "lt_sft",
    Paper("Composable Sparse Fine-Tuning for Cross-Lingual Transfer", "ACL 2022", "2110.07560", "selective"),
    where="the entries that full fine-tuning moves most",
)
class LTSFT(Masked):
    """Full fine-tuning first; the entries that moved most, |theta1 - theta0|, are trained again from theta0.

    ``calibrate`` does the first part and rewinds: model and head are then as before it.

    Args:
        ratio: of the backbone's parameters.
        entries: their number instead; None for ``ratio``.
        epochs: of the full fine-tuning.
        lr: its learning rate.
    """

    ratio: float = fraction(0.01)
    entries: int | None = option(None, ge=1, le=10**12, unit="entries")
    epochs: int = option(3, ge=1, unit="epochs")
    lr: float = option(5e-5, gt=0)

    def calibrate(self, tree: Tree, batches) -> None:
        with tree.off():
            frozen, head = copies(tree)
            moved = {n: t.clone().requires_grad_() for n, t in frozen.items()}
            trained = [*moved.values(), *head.values()]
            count = self.entries or int(self.ratio * sum(t.numel() for t in frozen.values()))
            dense_phase(tree, batches, self.epochs, lambda: moved | head, [(trained, self.lr)])
            chosen = largest({n: (moved[n].detach() - t).abs() for n, t in frozen.items()}, count)
        for name, part in masked_parts(tree).items():
            part.choose(chosen[name])


LOW, HIGH = -1.5, 1.5


def gate(alpha: Tensor) -> Tensor:
    """A sample of the hard concrete gate: clamp(3 sigmoid(logit u + alpha) - 1.5, 0, 1), u uniform."""
    u = torch.rand_like(alpha).clamp(1e-4, 1 - 1e-4)
    return ((HIGH - LOW) * torch.sigmoid(u.logit() + alpha) + LOW).clamp(0, 1)


def settled(alpha: Tensor) -> Tensor:
    """The gate without noise."""
    return ((HIGH - LOW) * torch.sigmoid(alpha) + LOW).clamp(0, 1)


@register(
    "diff_pruning",
    Paper("Parameter-Efficient Transfer Learning with Diff Pruning", "ACL 2021", "2012.07463", "selective"),
    where="the entries whose learned difference survives a sparse penalty",
)
class DiffPruning(Masked):
    """A difference to every tensor is learned under gates that are pushed shut; the largest ones are trained further.

    First phase, in ``calibrate``: theta = theta0 + z_g z * w with hard concrete gates z (one alpha per entry) and z_g
    (one per tensor), loss plus ``sparsity`` times the sum of sigmoid(alpha), the probability that a gate is open. Then
    the entries with the largest |z_g z w| (gates without noise) are chosen; in the second phase the mask is fixed and
    they are trained without gates. The head is trained on a copy in the first phase and afresh in the second.

    Args:
        ratio: of the backbone's parameters that are kept.
        epochs: of the first phase.
        lr: of w and the head in the first phase.
        gate_lr: of alpha.
        sparsity: weight of the penalty.
        start: the second phase starts from the ``learned`` w, as the released code, or from the ``pretrained`` values.
    """

    ratio: float = fraction(0.005)
    epochs: int = option(3, ge=1, unit="epochs")
    lr: float = option(1e-5, gt=0)
    gate_lr: float = option(0.1, ge=0)
    sparsity: float = nonnegative(1.25e-7)
    start: Literal["learned", "pretrained"] = "learned"

    @property
    def starts_as_identity(self) -> bool:
        return self.start == "pretrained"

    def calibrate(self, tree: Tree, batches) -> None:
        with tree.off():
            frozen, head = copies(tree)
            w = {n: torch.zeros_like(t, requires_grad=True) for n, t in frozen.items()}
            entry = {n: torch.full_like(t, 5.0, requires_grad=True) for n, t in frozen.items()}
            whole = {n: t.new_tensor(5.0).requires_grad_() for n, t in frozen.items()}
            alphas = [*entry.values(), *whole.values()]

            def weights() -> Tensors:
                return {n: t + gate(whole[n]) * gate(entry[n]) * w[n] for n, t in frozen.items()} | head

            def penalty() -> Tensor:
                return self.sparsity * sum(a.sigmoid().sum() for a in alphas)

            count = int(self.ratio * sum(t.numel() for t in frozen.values()))
            groups = [([*w.values(), *head.values()], self.lr), (alphas, self.gate_lr)]
            dense_phase(tree, batches, self.epochs, weights, groups, penalty)
            with torch.no_grad():
                scores = {n: (settled(whole[n]) * settled(entry[n]) * w[n]).abs() for n in frozen}
            chosen = largest(scores, count)
        for name, part in masked_parts(tree).items():
            index = chosen[name].long()
            value = (frozen[name] + w[name].detach()).flatten()[index] if self.start == "learned" else None
            part.choose(chosen[name], value)
