"""Training chosen entries of existing tensors: GPS (CVPR 2024, arXiv 2312.10136), FISH mask (NeurIPS 2021, arXiv
2111.09839) and choice by magnitude. Child-Tuning is in child_tuning.py, LT-SFT and diff pruning in masks_learned.py.

What is trained is the flat vector of the chosen entries, not the tensor under a mask: weight decay and momentum cannot
move the others, and the optimiser keeps state for the chosen ones alone. The gradient of the whole tensor is formed on
the way, so memory and time of a step are near those of full fine-tuning.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torchvision import transforms

from ..attached.tree import Tree
from ..backbone.sites import Sites
from ..errors import MethodError
from ..interventions.base import Intervention, set_tensor
from ..interventions.weights import ReplaceTensor
from ..numerics import top_positions, weighted_change
from ..options import fraction, option
from .base import Method, Paper, register, tensors_of


class SparseTensor(ReplaceTensor):
    """A frozen tensor with ``value`` at the flat positions ``index`` (int32). Both are empty where none is chosen."""

    resizable = frozenset({"index", "value"})

    @property
    def from_weights(self) -> bool:
        return bool(self.value.numel())

    def __init__(self, sites: Sites, name: str, index: Tensor | None = None):
        super().__init__(sites, name)
        self.register_buffer("index", torch.empty(0, dtype=torch.int32, device=self.frozen.device))
        self.value = nn.Parameter(torch.empty(0, dtype=self.frozen.dtype, device=self.frozen.device))
        if index is not None:
            self.choose(index)

    def choose(self, index: Tensor, value: Tensor | None = None) -> None:
        """Train the entries at ``index``, from their pretrained values or from ``value``."""
        set_tensor(self, "index", index)
        set_tensor(self, "value", self.frozen.detach().flatten()[index.long()] if value is None else value)

    def forward(self, frozen: Tensor) -> Tensor:
        if not self.value.numel():
            return frozen
        return frozen.flatten().scatter(0, self.index.long(), self.value.to(frozen.dtype)).view_as(frozen)

    def summed(self, parts: "Sequence[SparseTensor]", weights: Sequence[float]) -> dict[str, Tensor]:
        """All entries that any of them chose: the frozen value + the sum of w_i (value_i - frozen value)."""
        frozen = self.frozen.detach().flatten()
        wholes = [frozen.scatter(0, part.index.long(), part.value.detach()) for part in parts]
        index = torch.cat([part.index for part in parts]).unique()
        return {"index": index, "value": weighted_change(wholes, weights, frozen)[index.long()]}

    def own_entries(self) -> dict[str, Tensor | None]:
        return {self.tensor_name: self.index} if self.value.numel() else {}

    def why_not(self, tensors: dict[str, Tensor]) -> str | None:
        index, value = tensors["index"], tensors["value"]
        if index.shape != value.shape:
            return f"{index.numel()} positions for {value.numel()} values"
        return why_no_index(index, self.frozen.numel(), "positions", "a tensor of {} entries")


def why_no_index(index: Tensor, size: int, what: str, among: str) -> str | None:
    """Why numbers cannot be different positions among ``size`` others, as an error's text; or None.

    Args:
        index: from a file.
        size: how many positions there are.
        what: the numbers, in the plural.
        among: what they are positions in, with ``{}`` for the size.
    """
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        return f"{what} are whole numbers, not {str(index.dtype).removeprefix('torch.')}"
    if index.is_meta or not index.numel():
        return None
    index = index.long()
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= size:
        return (
            f"{what} up to {high} in {among.format(size)}" if low >= 0 else f"{what} down to {low} in {among.format(size)}"
        )
    if not (index.diff() > 0).all() and len(index.unique()) < index.numel():
        return f"{what} that stand there twice"
    return None


class Masked(Method):
    """Base of the methods that choose entries. Subclasses say which tensors are masked and which train whole."""

    def split(self, sites: Sites) -> tuple[list[str], list[str]]:
        """Names of the backbone's masked tensors, and of those that are trained whole; the others stay frozen."""
        return [n for n, _ in sites.parameters()], []

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        masked, whole = self.split(sites)
        for name in masked:
            yield name, SparseTensor(sites, name)
        if whole:
            yield "tensors", tensors_of(sites, whole)

    def looks_calibrated(self, tree: Tree) -> bool:
        return any(part.index.numel() for part in masked_parts(tree).values())


# ---- tools ----


def masked_parts(tree: Tree) -> dict[str, SparseTensor]:
    """The masked tensors of a method by their names in the model."""
    return {i.tensor_name: i for i in tree.interventions if isinstance(i, SparseTensor)}


def largest(scores: dict[str, Tensor], count: int, most: bool = True) -> dict[str, Tensor]:
    """Flat positions, per tensor, of the ``count`` largest (or smallest) scores of all tensors together."""
    flat = torch.cat([s.flatten() for s in scores.values()])
    if not 1 <= count <= flat.numel():
        raise MethodError(f"a budget of {count} entries of {flat.numel()}; choose another ratio")
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[top_positions(flat if most else -flat, count)] = True
    return positions(scores, chosen)


def positions(like: dict[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
    """A flat boolean mask over all tensors as flat positions in each of them."""
    parts = chosen.split([t.numel() for t in like.values()])
    return {name: part.nonzero().flatten().int() for name, part in zip(like, parts, strict=True)}


class Gradients:
    """Gradients of the bare model's tensors, which stay as they are: no flag, value or ``grad`` of theirs changes."""

    def __init__(self, tree: Tree):
        self.model, self.objective, self.name = tree.model, tree.objective, tree.method.name
        live = dict(tree.model.named_parameters())
        self.leaves = {name: live[name].detach().requires_grad_() for name in masked_parts(tree)}

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The task's mean loss of a batch."""
        return self.objective.loss(images, labels, self.leaves)

    def logits(self, images: Tensor) -> Tensor:
        """The classifier's logits (B, C)."""
        self.objective.need_classifier(self.name)
        return functional_call(self.model, self.leaves, (images,))

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (B, D), as the classifier takes them."""
        self.objective.need_classifier(self.name)
        return functional_call(_Pooled(self.model), {f"model.{n}": t for n, t in self.leaves.items()}, (images,))

    def of(self, loss: Tensor, retain: bool = False) -> dict[str, Tensor]:
        """The loss's gradient by tensor; 0 where it does not reach."""
        leaves = list(self.leaves.values())
        found = torch.autograd.grad(loss, leaves, retain_graph=retain, allow_unused=True)
        return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(self.leaves.items(), found, strict=True)}

    def summed(self, terms: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The sum of dicts of tensors."""
        total = {n: torch.zeros_like(t) for n, t in self.leaves.items()}
        for term in terms:
            for name, value in term.items():
                total[name] += value
        return {n: t.detach() for n, t in total.items()}


class _Pooled(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_head(self.model.forward_features(images), pre_logits=True)


# ---- GPS ----


def contrast(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss (Khosla et al., 2020): mean over anchors of -mean over same-class others of log p.

    p is the softmax over all other samples of the cosine similarity divided by the temperature.
    """
    z = F.normalize(features, dim=-1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_p = (z @ z.T / temperature).masked_fill(itself, -math.inf).log_softmax(-1)
    same = (labels[:, None] == labels) & ~itself
    return -(log_p.masked_fill(~same, 0).sum(-1) / same.sum(-1)).mean()


def augment(model: nn.Module, images: Tensor) -> Tensor:
    """Another view of each image: random crop, flip, colour and greyscale, drawn for each one alone."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    mean, std = (torch.tensor(cfg.get(k, (d,) * 3)).view(-1, 1, 1) for k, d in (("mean", 0.0), ("std", 1.0)))
    place = transforms.Compose(
        [transforms.RandomResizedCrop(images.shape[-2:], antialias=True), transforms.RandomHorizontalFlip()]
    )
    colour = transforms.Compose(
        [transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), transforms.RandomGrayscale(0.2)]
    )
    mean, std = mean.to(images.device), std.to(images.device)
    views = []
    for image in images.float():
        view = place(image)
        if len(view) == 3:  # colours are changed as they are seen, between 0 and 1
            view = (colour((view * std + mean).clamp(0, 1)) - mean) / std
        views.append(view)
    return torch.stack(views).to(images.dtype)


@register(
    "gps",
    Paper(
        "Gradient-based Parameter Selection for Efficient Fine-Tuning",
        "CVPR 2024",
        "2312.10136",
        "selective",
        vtab="75.18 mean of 19 tasks (77.47 group mean), quoted by V-PETL Bench",
    ),
    where="the k entries of largest gradient in each row of every matrix, and every bias",
)
class GPS(Masked):
    """In each row (output neuron) of every matrix the k entries with the largest gradient are trained.

    The gradient is summed over one pass of the training set in training mode. Biases outside norms (relative-position
    tables too) and LayerScale are trained whole; norms, class token and position embedding stay frozen. Where the
    loader gives one view of an image, two are drawn from it as in the released code (crop, flip, colour, greyscale,
    with the model's own mean and std); a loader may give both itself as (B, 2, C, H, W).

    Args:
        k: entries per row; a convolution counts as (O, rest).
        loss: ``contrastive`` on pooled features of two views, or the ``task`` loss of the one view.
        temperature: of the contrastive loss.
        views: ``augment``, or ``same``: the loader's view twice, which differ by dropout and drop path alone.
    """

    k: int = option(1, ge=1, unit="entries")
    loss: Literal["contrastive", "task"] = "contrastive"
    temperature: float = option(0.07, ge=1e-3)
    views: Literal["augment", "same"] = "augment"

    presets = {
        "camelyon": {"k": 2},
        "cub": {"k": 2},
        "nabirds": {"k": 20},
        "flowers": {"k": 1},
        "cars": {"k": 15},
        "dogs": {"k": 1},
    }

    def split(self, sites: Sites) -> tuple[list[str], list[str]]:
        norms = tuple(f"{place.path}." for place in sites.norms())
        masked, whole = [], []
        for name, parameter in sites.parameters():
            if name.startswith(norms) or "." not in name:  # tokens and position embedding belong to the model itself
                continue
            rows = parameter.ndim > 1 and "bias" not in name.rpartition(".")[2]
            (masked if rows else whole).append(name)
        return masked, whole

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        # The number of entries is known beforehand: until calibration they are the first of each row.
        for path, part in super().build(sites):
            if isinstance(part, SparseTensor):
                part.choose(self.rows(part.frozen.new_zeros(part.frozen.shape), first=True))
            yield path, part

    def looks_calibrated(self, tree: Tree) -> bool:
        """Not where the first entries of each row are still the chosen ones (but where a row has no more than k)."""
        parts = [p for p in masked_parts(tree).values() if not p.index.is_meta and p.frozen[0].numel() > self.k]
        return not parts or any(not torch.equal(p.index, self.rows(torch.empty_like(p.frozen), first=True)) for p in parts)

    def rows(self, score: Tensor, first: bool = False) -> Tensor:
        """Flat positions of the k largest (or first) entries of each row."""
        score = score.flatten(1)
        count, width = min(self.k, score.shape[1]), score.shape[1]
        if first:
            columns = torch.arange(count, device=score.device).expand(len(score), -1)
        else:
            columns = score.topk(count, dim=1).indices.sort(1).values
        return (columns + width * torch.arange(len(score), device=score.device)[:, None]).flatten().int()

    def calibrate(self, tree: Tree, batches) -> None:
        tree.model.train()
        with tree.off():
            gradients = Gradients(tree)
            total = gradients.summed(gradients.of(self.value(gradients, *batch)) for batch in batches)
        for name, part in masked_parts(tree).items():
            part.choose(self.rows(total[name].abs()))

    def value(self, gradients: Gradients, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of one batch."""
        given = images.unbind(1) if images.ndim == 5 else (images, images)
        if self.loss == "task":
            return gradients.loss(given[0], labels)
        if images.ndim == 4 and self.views == "augment":
            given = tuple(augment(gradients.model, images) for _ in range(2))
        return contrast(gradients.features(torch.cat(given)), labels.repeat(2), self.temperature)


# ---- FISH ----


@register(
    "fish",
    Paper("Training Neural Networks with Fixed Sparse Masks", "NeurIPS 2021", "2111.09839", "selective"),
    where="the entries of largest Fisher information",
)
class FISH(Masked):
    """The entries with the largest diagonal Fisher information, over all tensors of the backbone, are trained.

    Their number is int(ratio * all parameters) less those of the classifier, which trains whole within the budget. The
    information is a sum over single examples, in evaluation mode: of g² at the true label, or of the expectation of g²
    over the model's own distribution of labels, which costs one backward pass per class.

    Args:
        ratio: of all parameters, head included.
        variant: ``label`` or ``expect``.
        samples: examples that are looked at.
    """

    ratio: float = fraction(0.005)
    variant: Literal["label", "expect"] = "label"
    samples: int = option(1024, ge=1, unit="images")

    def calibrate(self, tree: Tree, batches) -> None:
        head = sum(p.numel() for place in tree.sites.heads for p in place.module.parameters())
        every = head + sum(p.numel() for _, p in tree.sites.parameters())
        count = int(self.ratio * every) - head
        if count < 1:
            raise MethodError(
                f"{self.name}.ratio: {self.ratio} of {every:,} parameters is less than the {head:,} of the head, which "
                f"count too; it must be above {(head + 1) / every:.4g}"
            )
        tree.eval_all()  # the heads too: single examples say nothing to a batch norm
        with tree.off():
            gradients = Gradients(tree)
            information = gradients.summed(self.squares(gradients, batches))
        chosen = largest(information, count)
        for name, part in masked_parts(tree).items():
            part.choose(chosen[name])

    def squares(self, gradients: Gradients, batches) -> Iterator[dict[str, Tensor]]:
        """One term of the Fisher information after the other."""
        left = self.samples
        for images, labels in batches:
            for image, label in zip(images[:left], labels[:left], strict=True):
                if self.variant == "label":
                    yield {n: g.square() for n, g in gradients.of(gradients.loss(image[None], label[None])).items()}
                    continue
                log_p = gradients.logits(image[None])[0].log_softmax(-1)
                for share, term in zip(log_p.detach().exp(), log_p, strict=True):
                    yield {n: share * g.square() for n, g in gradients.of(-term, retain=True).items()}
            left -= len(images)
            if left <= 0:
                return


# ---- magnitude ----


@register(
    "magnitude",
    Paper("Parameter-Efficient Fine-Tuning without Introducing New Latency", "ACL 2023", "2305.16742", "selective"),
    where="the entries of largest or smallest pretrained magnitude",
)
class Magnitude(Masked):
    """The entries with the largest (or smallest) pretrained magnitude, over all tensors of the backbone, are trained.

    The choice needs no data and is made at attach (not on the meta device, where there are no values).

    Args:
        ratio: of the backbone's parameters.
        order: ``largest``, or ``smallest`` as in the paper (PaFi).
    """

    ratio: float = fraction(0.005)
    order: Literal["largest", "smallest"] = "largest"

    presets = {"pafi": {"order": "smallest"}}

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        sizes = {n: p.detach().abs() for n, p in sites.parameters()}
        chosen: dict[str, Tensor] = {}
        if not any(s.is_meta for s in sizes.values()):
            count = int(self.ratio * sum(s.numel() for s in sizes.values()))
            chosen = largest(sizes, count, most=self.order == "largest")
        for name in sizes:
            yield name, SparseTensor(sites, name, chosen.get(name))
