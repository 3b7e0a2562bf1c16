"""Choosing existing tensors: full fine-tuning, linear probe, partial-k, BitFit, norm and attention tuning."""

from collections.abc import Iterator

from ..backbone.sites import Sites
from ..errors import MethodError
from ..interventions.weights import ExistingTensors
from ..options import option
from .base import Method, Paper, register, tensors_of

_VPETL = "quoted by V-PETL Bench"


class _Selective(Method):
    def names(self, sites: Sites) -> Iterator[str]:
        """Names of the backbone's tensors that are trained."""
        raise NotImplementedError

    def build(self, sites: Sites) -> Iterator[tuple[str, ExistingTensors]]:
        yield "tensors", tensors_of(sites, self.names(sites))


@register(
    "full",
    Paper(
        "Visual Prompt Tuning (full fine-tuning baseline)",
        "ECCV 2022",
        "2203.12119",
        "selective",
        vtab=f"65.57 mean of 19 tasks (68.97 group mean), {_VPETL}",
    ),
    where="every tensor of the backbone",
)
class Full(_Selective):
    """Every tensor of the backbone is trained, as is the head."""

    def names(self, sites: Sites) -> Iterator[str]:
        return (n for n, _ in sites.parameters())


@register(
    "linear",
    Paper(
        "Visual Prompt Tuning (linear probing baseline)",
        "ECCV 2022",
        "2203.12119",
        "selective",
        vtab=f"52.94 mean of 19 tasks (57.64 group mean), {_VPETL}",
    ),
    where="the head alone",
    aliases=("linear_probe",),
)
class Linear(_Selective):
    """Linear probe: the backbone stays as it is and only the head is trained."""

    head_alone = True

    def names(self, sites: Sites) -> Iterator[str]:
        return iter(())


@register(
    "partial",
    Paper("Visual Prompt Tuning (partial-k baseline)", "ECCV 2022", "2203.12119", "selective"),
    where="the last k blocks and the final norm",
)
class Partial(_Selective):
    """The last k blocks in forward order (across Swin's stages) and the final norms are trained.

    Args:
        k: how many blocks.
    """

    k: int = option(1, ge=1, le=1000, unit="blocks")

    def names(self, sites: Sites) -> Iterator[str]:
        if self.k > len(sites.blocks):
            raise MethodError(f"{self.name}.k: {self.k} blocks of a model that has {len(sites.blocks)}")
        places = [*sites.blocks[-self.k :], *sites.final_norms]
        return (n for n, _ in sites.parameters() if n.startswith(tuple(f"{p.path}." for p in places)))


@register(
    "bitfit",
    Paper(
        "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
        "ACL 2022",
        "2106.10199",
        "selective",
        vtab=f"62.05 mean of 19 tasks (65.22 group mean), {_VPETL}",
    ),
    where="every bias",
)
class BitFit(_Selective):
    """Every bias of the backbone is trained, those of norms and patch embedding included.

    Args:
        rel_pos_bias: also Swin's ``relative_position_bias_table``, which the published Swin counts contain by accident.
        terms: only biases whose path has one of these components, e.g. ``["qkv", "fc1"]``; None for all.
    """

    rel_pos_bias: bool = False
    terms: list[str] | None = option(None, free="a part of a path")

    def names(self, sites: Sites) -> Iterator[str]:
        found = []
        for name, _ in sites.parameters():
            parts = name.split(".")
            wanted = parts[-1] in ("bias", "q_bias", "k_bias", "v_bias")
            wanted |= self.rel_pos_bias and "bias" in parts[-1]
            if wanted and (self.terms is None or set(parts) & set(self.terms)):
                found.append(name)
        if not found:
            raise MethodError(f"{self.name}: no bias of {type(sites.model).__name__} matches terms={self.terms}")
        return iter(found)


@register(
    "norm",
    Paper(
        "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning",
        "ICLR 2024",
        "2312.11420",
        "selective",
    ),
    where="every normalisation layer",
    aliases=("layernorm", "norm_tuning"),
)
class NormTuning(_Selective):
    """Weights and biases of every normalisation layer are trained: block, patch, downsample, q/k and final norms."""

    def names(self, sites: Sites) -> Iterator[str]:
        return (f"{place.path}.{n}" for place in sites.norms() for n, _ in place.module.named_parameters())


@register(
    "attention",
    Paper("Three Things Everyone Should Know About Vision Transformers", "ECCV 2022", "2203.09795", "selective"),
    where="every attention, and the position embedding",
    aliases=("attn", "attention_only"),
)
class AttentionOnly(_Selective):
    """All tensors of the attentions (weights, biases, relative-position tables) and the position embedding are trained.

    The released code also leaves the position embedding free, and keeps the patch embedding frozen.
    """

    def names(self, sites: Sites) -> Iterator[str]:
        inside = tuple(f"{block.attn.path}." for block in sites.blocks)
        return (n for n, _ in sites.parameters() if n.startswith(inside) or n == "pos_embed")
