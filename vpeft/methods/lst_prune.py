"""Side blocks for LST that are cut out of the backbone's blocks.

The channels that are kept go from one matrix to the next: the patch embedding's best w rows are the first choice; each
matrix keeps the columns that the matrix before it kept as rows, and its own best rows; norms follow the columns. A row's
score is the sum of the importance of its kept entries. q, k and v share one choice, by the product of their three
importances entry by entry. The chain goes through blocks without a side block too. As released, channels of the residual
stream are not matched with each other across a branch. LayerScale, which a side block has none of, is multiplied in.
"""

import torch
from torch import Tensor, nn

from ..attached.tree import Tree
from ..backbone.attention import separate_bias
from ..backbone.modules import BlockSite, LinearSite
from ..errors import UnsupportedModelError
from .base import Method
from .masks import Gradients

Importance = dict[str, Tensor]


class _Fisher(Gradients):
    """Gradients of the tensors of these names."""

    def __init__(self, tree: Tree, names: set[str]):
        self.model, self.objective, self.name = tree.model, tree.objective, tree.method.name
        live = dict(tree.model.named_parameters())
        self.leaves = {name: live[name].detach().requires_grad_() for name in sorted(names)}

    def squares(self, batches, samples: int):
        """One term of the Fisher information after the other, at the true labels."""
        for images, labels in batches:
            for image, label in zip(images[:samples], labels[:samples], strict=True):
                loss = self.loss(image[None], label[None])
                yield {n: g.square() for n, g in self.of(loss).items()}
            samples -= len(images)
            if samples <= 0:
                return


def best(score: Tensor, count: int, heads: int = 1) -> Tensor:
    """Ascending positions of the ``count`` largest scores, as many within each of ``heads`` equal parts."""
    parts = score.unflatten(0, (heads, -1))
    found = parts.topk(count // heads, dim=1).indices.sort(1).values
    return (found + parts.shape[1] * torch.arange(heads, device=score.device)[:, None]).flatten()


def rows_of(site: LinearSite) -> slice:
    """The slot's rows in its linear."""
    return slice(*site.rows)


def bias_of(site: LinearSite) -> Tensor:
    """The bias of a slot's rows, 0 where it has none."""
    bias = site.module.bias
    if bias is None and site.bias_outside is not None:
        bias = separate_bias(site.bias_outside.module)
    return site.module.weight.new_zeros(site.out_features) if bias is None else bias.detach()[rows_of(site)]


_INSTEAD = "; attach with init='random'"


def check_block(block: BlockSite) -> None:
    """Raise where nothing of an ordinary block's shape can be cut out."""
    q, k = block.linears("q")[0], block.linears("k")[0]
    if len(block.linears("fc1")) != 1 or block.linears("fc1")[0].out_features != block.linears("fc2")[0].in_features:
        raise UnsupportedModelError(
            f"init='prune': {block.mlp.path} is no plain MLP, so none can be cut out of it{_INSTEAD}"
        )
    if q.out_features != k.out_features or not block.pre_norm:
        raise UnsupportedModelError(f"init='prune': no plain block can be cut out of {block.path}{_INSTEAD}")


def pruned_blocks(method: Method, tree: Tree, batches, layers: list[int]) -> dict[str, Tensor]:
    """The side blocks' tensors by their names in the state dict."""
    sites = tree.sites
    if sites.patch_projection is None:
        raise UnsupportedModelError(f"init='prune': no patch embedding to begin the choice of channels with{_INSTEAD}")
    for block in sites.blocks:
        check_block(block)
    linears = [s for b in sites.blocks for slot in ("qkv", "proj", "fc1", "fc2") for s in b.linears(slot)]
    names = {f"{place.path}.weight" for place in [sites.patch_projection, *linears]}
    tree.eval_all()  # the heads too: single examples say nothing to a batch norm
    if method.importance == "fisher":
        fisher = _Fisher(tree, names)
        importance = fisher.summed(fisher.squares(batches, method.samples))
    else:
        live = dict(tree.model.named_parameters())
        importance = {n: live[n].detach().abs() for n in names}
    width = method.width(sites)
    kept = best(importance[f"{sites.patch_projection.path}.weight"].flatten(1).sum(1), width)
    values: dict[str, Tensor] = {}
    for block in sites.blocks:
        hidden = block.linears("fc2")[0].in_features // method.reduction
        cut, kept = cut_block(block, importance, kept, width, hidden, block.heads if method.head_aware else 1)
        if block.index in layers:
            values |= {f"lst.blocks.{block.index}.{n}": t for n, t in cut.items()}
    return values


def cut_block(
    block: BlockSite, importance: Importance, columns: Tensor, width: int, hidden: int, heads: int
) -> tuple[dict[str, Tensor], Tensor]:
    """One side block's tensors, and the rows its last matrix kept."""
    found: dict[str, Tensor] = {}

    def norm(name: str, module: nn.Module, kept: Tensor) -> None:
        found[f"{name}.weight"] = module.weight.detach()[kept]
        found[f"{name}.bias"] = torch.zeros_like(found[f"{name}.weight"])
        if getattr(module, "bias", None) is not None:
            found[f"{name}.bias"] = module.bias.detach()[kept]

    def linear(name: str, kept: Tensor, count: int, branch: int | None = None) -> Tensor:
        site = block.linears(name.rpartition(".")[2])[0]
        gain = None if branch is None else block.layer_scale(branch)
        rows = best(importance[f"{site.path}.weight"][:, kept].sum(1), count)
        scale = torch.ones_like(kept[:1], dtype=site.module.weight.dtype) if gain is None else gain.detach()[rows]
        found[f"{name}.weight"] = site.module.weight.detach()[rows][:, kept] * scale[:, None]
        found[f"{name}.bias"] = bias_of(site)[rows] * scale
        return rows

    norm("norm1", block.norm1.module, columns)
    sites = [block.linears(slot)[0] for slot in ("q", "k", "v")]
    parts = [importance[f"{s.path}.weight"][rows_of(s)][:, columns].double() for s in sites]
    rows = best((parts[0] * parts[1] * parts[2]).sum(1), width, heads)
    weights = [s.module.weight.detach()[rows_of(s)][rows][:, columns] for s in sites]
    found["attn.qkv.weight"] = torch.cat(weights)
    found["attn.qkv.bias"] = torch.cat([bias_of(s)[rows] for s in sites])
    kept = linear("attn.proj", rows, width, branch=1)
    norm("norm2", block.norm2.module, kept)
    kept = linear("mlp.fc1", kept, hidden)
    kept = linear("mlp.fc2", kept, width, branch=2)
    return found, kept
