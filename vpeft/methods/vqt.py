"""VQT: visual query tuning (Tu, Mai and Chao, CVPR 2023, arXiv 2212.03220)."""

import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attached.tree import Tree
from ..backbone.blocks import check_rows, rows_through_block
from ..backbone.modules import LAST, BlockSite, ModuleRef
from ..backbone.sites import Sites, patch_fan
from ..errors import MethodError, UnsupportedModelError
from ..interventions.attention import AttentionPrefix
from ..interventions.base import OWN_ROWS, Intervention
from ..numerics import unregistered
from ..options import probability
from .base import Blocks, Method, Paper, PerBlock, per_block, register, which_blocks


class ExtraQueries(AttentionPrefix):
    """Rows that read a block's tokens without being read: they attend to the tokens' keys and values, and go through
    the rest of the frozen block by themselves.

    ``forward(batch)`` gives the rows (B, T, D); ``pop()`` gives what the block made of them in the present forward.
    The block's own path stays what it is, and carries no graph: what the rows read of it is detached. While gradients
    are recorded, the rows run only when they are taken, so that activation checkpointing never sees them.
    """

    brings = frozenset({OWN_ROWS})

    def __init__(self, block: BlockSite):
        super().__init__(block, LAST)  # no gradient enters any block's own path
        check_rows(block)
        self.block = block

    @property
    def runs_from(self) -> int:
        return self.block.index

    def hooked(self) -> list[ModuleRef]:
        return [self.place, self.block]

    def taps(self) -> list[int]:
        return [self.block.index - 1]  # the keys and values are made of what enters the block

    def install(self) -> None:
        super().install()
        self.act_after(self.block, self._leave)

    def meet(self, x: Tensor, k: Tensor, v: Tensor) -> None:
        self.flow.put(self, "read", (k.detach(), v.detach()), carried=True)

    def _leave(self, args: tuple, output: Tensor) -> None:
        if not torch.is_grad_enabled():
            self.flow.put(self, "rows", self._rows(*self.flow.pop(self, "read")), carried=True)

    def _rows(self, k: Tensor, v: Tensor) -> Tensor:
        return rows_through_block(self.block, self(k.shape[0]), k, v)

    def pop(self) -> Tensor:
        """The rows (B, T, D) after the block; they are then forgotten.

        Raises:
            MethodError: the block has not run in this forward, or the rows were taken.
        """
        rows, read = self.flow.pop(self, "rows"), self.flow.pop(self, "read")
        if rows is None and read is None:
            raise MethodError(
                f"{self.block.path} has not run in this forward: call the model, or its head with what forward_features gave"
            )
        return self._rows(*read) if rows is None else rows


class WideHead(Intervention):
    """A linear classifier of more inputs, which stands in the place and under the name of the handle's classifier.

    ``forward(x)`` makes its inputs from what an ordinary classifier would get. It counts as the handle's head: it is
    trained, saved and decayed as one, ``get_classifier`` gives it, and ``reset_classifier`` makes it anew, with ``width``
    inputs.

    Args:
        sites: of the model.
        more: inputs beyond the ordinary classifier's.
    """

    needs_unpooled = True

    def __init__(self, sites: Sites, more: int):
        super().__init__(LAST)
        if len(sites.heads) != 1 or not isinstance(sites.heads[0].module, nn.Linear):
            found = ", ".join(f"{h.path} ({type(h.module).__name__})" for h in sites.heads) or "none"
            raise UnsupportedModelError(f"one linear classifier is widened; this model has {found}")
        self.model, self.path = ModuleRef("", sites.model), sites.heads[0].path
        self.width = sites.heads[0].module.in_features + more

    @property
    def current(self) -> ModuleRef:
        """What stands in the classifier's place."""
        return ModuleRef(self.path, self.model.module.get_submodule(self.path))

    def hooked(self) -> list[ModuleRef]:
        return [self.current]

    def exchange_classifier(self) -> None:
        """Widen the classifier that stands in the model: what comes out has as many outputs, and fresh values."""
        own, wide = self.current.module, nn.Identity()
        if isinstance(own, nn.Linear):
            like = {"device": own.weight.device, "dtype": own.weight.dtype}
            wide = nn.Linear(self.width, own.out_features, bias=own.bias is not None, **like)
            wide.requires_grad_(own.weight.requires_grad)
        parent, _, leaf = self.path.rpartition(".")
        setattr(self.model.module.get_submodule(parent), leaf, wide.train(own.training))

    def install(self) -> None:
        self.act_before(self.current, self._widen)

    def _widen(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return (self(args[0]), *args[1:]), kwargs

    def follow_classifier(self, heads: list[ModuleRef]) -> None:
        self.exchange_classifier()
        self.install()


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
        z = self.pop()
        if self.pooling == "none":
            return z.flatten(1)
        return z.mean(1) if self.pooling == "mean" else (self.weights[:, None] * z).sum(1)


class Features(WideHead):
    """The classifier of the model's own feature and every block's entry, side by side."""

    def __init__(self, sites: Sites, readers: list[Queries], normalize: bool):
        super().__init__(sites, sum(r.width for r in readers))
        self.normalize = normalize
        # Unregistered: their tensors are saved once, under the blocks.
        unregistered(self, readers=readers)

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

    tokens: PerBlock = per_block(1, "tokens")
    normalize: bool = True
    pooling: Literal["none", "mean", "weighted"] = "none"
    dropout: float = probability(0.0)
    blocks: Blocks = which_blocks()

    @property
    def starts_as_identity(self) -> bool:
        return False

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        if sites.blocks[0].maps:
            raise UnsupportedModelError("published for plain ViTs; a Swin's tokens see only their window, and widths differ")
        if sites.patch_projection is None:
            raise UnsupportedModelError("no patch embedding to read the queries' initial range from")
        readers = []
        for block, tokens in self.sized_blocks(sites, "tokens", self.blocks):
            bound = math.sqrt(6 / (patch_fan(sites) + block.width))
            readers.append(Queries(self, block, tokens, bound))
            yield f"{block.path}.vqt", readers[-1]
        if readers:
            yield "vqt", Features(sites, readers, self.normalize)

    def notes(self, tree: Tree) -> list[tuple[str, str]]:
        own, head = sum(p.numel() for _, p in tree.trained()), sum(p.numel() for _, p in tree.head_parameters())
        features = next(m for m in tree.modules() if isinstance(m, Features))
        inputs = features.width - sum(r.width for r in features.readers)
        return [
            ("queries", f"{own:,}"),
            ("with head", f"{own + head:,}: the head has {features.width:,} inputs per class instead of {inputs:,}"),
        ]
