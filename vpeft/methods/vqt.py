"""VQT: visual query tuning (Tu, Mai and Chao, CVPR 2023, arXiv 2212.03220)."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..interventions import ExtraQueries, Intervention, WideHead
from ..sites import BlockSite, Sites, patch_fan
from .base import Blocks, Method, Paper, PerBlock, register

if TYPE_CHECKING:
    from ..attach import Handle


class Queries(ExtraQueries):
    """``queries`` (T, D) of one block, and how what they read becomes one entry of the head's input."""

    no_decay = frozenset({"queries"})

    def __init__(self, method: "VQT", block: BlockSite, tokens: int, bound: float):
        super().__init__(block)
        self.queries = nn.Parameter(torch.empty(tokens, block.width).uniform_(-bound, bound))
        self.drop = nn.Dropout(method.dropout)
        self.pooling = method.pooling
        self.width = block.width * (tokens if method.pooling == "none" else 1)
        if method.pooling == "weighted":
            self.weights = nn.Parameter(torch.ones(tokens))

    def forward(self, batch: int) -> Tensor:
        return self.drop(self.queries.expand(batch, -1, -1))

    def entry(self) -> Tensor:
        """(B, T D), or (B, D) where the T rows are pooled."""
        z = self.take()
        if self.pooling == "none":
            return z.flatten(1)
        return z.mean(1) if self.pooling == "mean" else (self.weights[:, None] * z).sum(1)


class Features(WideHead):
    """The classifier of the model's own feature and every block's entry, side by side."""

    def __init__(self, sites: Sites, readers: list[Queries], normalize: bool):
        super().__init__(sites, sum(r.width for r in readers))
        self.normalize = normalize
        # Unregistered: their tensors are saved once, under the blocks.
        object.__setattr__(self, "readers", readers)

    def forward(self, x: Tensor) -> Tensor:
        entries = [x.detach(), *(reader.entry() for reader in self.readers)]
        if self.normalize:
            entries = [F.normalize(entry, dim=-1) for entry in entries]
        return torch.cat(entries, -1)


@register(
    "vqt",
    Paper(
        "Visual Query Tuning: Towards Effective Usage of Intermediate Representations for Parameter and Memory "
        "Efficient Transfer Learning",
        "CVPR 2023",
        "2212.03220",
        "prompt",
    ),
    where="queries that read every block, and a head that sees all they read",
)
class VQT(Method):
    """T learned queries per block attend to its tokens (never the other way) and end at the head, not in the next block.

    With z_i what block i makes of its queries Q_i, and f the feature that the model's own classifier would get,
    logits = Linear([n(f), n(z_1), …, n(z_L)]), where n divides one entry (all T D numbers of a block) by its length. The
    z_i do not pass the final norm, and f is what it is without the method. No gradient enters the backbone's own path;
    only the T rows of each block carry a graph.

    The head has D (1 + L T) inputs instead of D, which is most of what is trained; ``summary`` gives both counts. It
    stands in the place of the model's classifier and counts as the head everywhere; ``reset_classifier`` makes it anew.

    Args:
        tokens: T, one for all blocks or one per block (0: none there). Published on VTAB: 1 for most tasks, 10 or 20 for
            some.
        normalize: divide each entry by its length.
        pooling: ``none`` gives the head all T rows; ``mean`` their mean; ``weighted`` their sum with learned weights,
            which start at 1.
        dropout: on the queries, one draw per sample.
        blocks: which blocks; None for all.
    """

    tokens: PerBlock = 1
    normalize: bool = True
    pooling: Literal["none", "mean", "weighted"] = "none"
    dropout: float = 0.0
    blocks: Blocks = None

    @property
    def starts_as_identity(self) -> bool:
        return False

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        if sites.blocks[0].maps:
            raise UnsupportedModelError("published for plain ViTs; a Swin's tokens see only their window, and widths differ")
        if sites.patch_embed is None:
            raise UnsupportedModelError("no patch embedding to read the queries' initial range from")
        readers = []
        for block, tokens in self.sized_blocks(sites, "tokens", self.blocks):
            bound = math.sqrt(6 / (patch_fan(sites) + block.width))
            readers.append(Queries(self, block, tokens, bound))
            yield f"{block.path}.vqt", readers[-1]
        if readers:
            yield "vqt", Features(sites, readers, self.normalize)

    def notes(self, handle: "Handle") -> list[tuple[str, str]]:
        own, head = sum(p.numel() for p in handle.parameters()), sum(p.numel() for _, p in handle.head_parameters())
        features = next(m for m in handle.root.modules() if isinstance(m, Features))
        inputs = features.width - sum(r.width for r in features.readers)
        return [
            ("queries", f"{own:,}"),
            ("with head", f"{own + head:,}: the head has {features.width:,} inputs per class instead of {inputs:,}"),
        ]
