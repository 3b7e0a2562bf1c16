"""Modules of a timm transformer by their paths: blocks, their parts, the linears behind a slot."""

from dataclasses import dataclass
from typing import Any

from timm.layers import GELU, GELUTanh, LayerNorm, use_reentrant_ckpt
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from ..errors import UnsupportedModelError, VpeftError, did_you_mean

IMAGE, FIRST, LAST = -2, -1, 10**9  # positions: the image, before all blocks, after all blocks


QKV_SLOTS = ("q", "k", "v")


SLOTS = ("qkv", *QKV_SLOTS, "proj", "fc1", "fc2")
CONTAINER = "vpeft"  # the submodule of a model that holds what methods brought to it


@dataclass(frozen=True, eq=False)
class ModuleRef:
    """A module of the model and its dotted path."""

    path: str
    module: nn.Module


@dataclass(frozen=True, eq=False)
class LinearSite(ModuleRef):
    """A frozen linear, or some of its output rows.

    Attributes:
        slot: what it computes: ``qkv``, ``q``, ``k``, ``v``, ``proj``, ``fc1`` or ``fc2``.
        rows: the output rows ``(start, stop)`` of the slot.
        bias_outside: the attention that adds its own q, k, v bias after this linear (BEiT, EVA, SwinV2), or None.
    """

    slot: str
    rows: tuple[int, int]
    bias_outside: ModuleRef | None = None

    @property
    def in_features(self) -> int:
        return self.module.in_features

    @property
    def out_features(self) -> int:
        return self.rows[1] - self.rows[0]

    @property
    def is_part(self) -> bool:
        """True where the slot is one of several in a fused linear."""
        return self.out_features != self.module.out_features


@dataclass(frozen=True, eq=False)
class BlockSite(ModuleRef):
    """One transformer block.

    Attributes:
        index: position in forward order over the whole model.
        stage: 0 in plain ViTs; the stage in hierarchical ones.
        width: channels of its residual stream.
        pre_norm: norm1 feeds the branch (else it follows it, as in SwinV2).
        maps: the block sees (B, H, W, C) instead of (B, N, C).
        windowed: what its attention branch adds is still cut into windows at ``branch1`` (SAM).
        norm1, attn, branch1, norm2, mlp, branch2: its parts; ``branch1`` and ``branch2`` are the drop-path modules,
            whose outputs are what is added to the residual stream.
    """

    index: int
    stage: int
    width: int
    pre_norm: bool
    maps: bool
    windowed: bool
    norm1: ModuleRef
    attn: ModuleRef
    branch1: ModuleRef
    norm2: ModuleRef
    mlp: ModuleRef
    branch2: ModuleRef

    @property
    def heads(self) -> int:
        """Attention heads."""
        return int(self.attn.module.num_heads)

    @property
    def head_width(self) -> int:
        """Channels of one head's keys and values."""
        return self.linears("v")[0].out_features // self.heads

    @property
    def mlp_input(self) -> ModuleRef:
        """The module whose input is the residual stream between the two branches."""
        return self.norm2 if self.pre_norm else self.mlp

    def layer_scale(self, branch: int) -> Tensor | None:
        """LayerScale's factors of branch 1 or 2: a module's in ViTs, the block's own in BEiT and EVA, or none."""
        scale = getattr(self.module, f"ls{branch}", None)
        return getattr(self.module, f"gamma_{branch}", None) if scale is None else getattr(scale, "gamma", None)

    def linears(self, slot: str) -> list[LinearSite]:
        """The linears behind a slot: usually one; several for ``qkv`` kept apart and for SwiGLU's ``fc1``.

        Raises:
            UnsupportedModelError: the block has no such linear.
        """
        if slot not in SLOTS:
            raise VpeftError(f"targets: unknown slot '{slot}'{did_you_mean(slot, SLOTS)}; known: {', '.join(SLOTS)}")
        attn, mlp = self.attn.module, self.mlp.module
        if slot == "proj":
            return [self._linear(self.attn, "proj", slot)]
        if slot in ("fc1", "fc2"):
            names = ("fc1_g", "fc1_x") if slot == "fc1" and hasattr(mlp, "fc1_g") else (slot,)
            return [self._linear(self.mlp, name, slot) for name in names]
        if isinstance(getattr(attn, "qkv", None), nn.Linear):
            whole = self._linear(self.attn, "qkv", slot)
            if slot == "qkv":
                return [whole]
            part, i = whole.module.out_features // 3, QKV_SLOTS.index(slot)
            return [LinearSite(whole.path, whole.module, slot, (i * part, (i + 1) * part), whole.bias_outside)]
        return [self._linear(self.attn, f"{s}_proj", s) for s in (QKV_SLOTS if slot == "qkv" else slot)]

    def _linear(self, parent: ModuleRef, name: str, slot: str) -> LinearSite:
        module = getattr(parent.module, name, None)
        path = f"{parent.path}.{name}"
        if not isinstance(module, nn.Linear):
            have = [n for n, m in parent.module.named_children() if isinstance(m, nn.Linear)]
            found = "missing" if module is None else f"a {type(module).__name__}"
            raise UnsupportedModelError(
                f"slot '{slot}': expected a linear at {path}, found it {found}; "
                f"{type(parent.module).__name__} has {', '.join(have) or 'no linears'}"
            )
        outside = parent if slot in ("qkv", *QKV_SLOTS) and getattr(parent.module, "q_bias", None) is not None else None
        return LinearSite(path, module, slot, (0, module.out_features), outside)


def made_anew(module: nn.Module, leaf: str) -> str | None:
    """The tensor that a module's forward uses in place of ``leaf``, where something computes it from ``leaf`` each time.

    So do ``torch.nn.utils.prune``, ``weight_norm``, ``spectral_norm`` and parametrisations. None where the forward uses
    ``leaf`` itself.
    """
    if isinstance(module, parametrize.ParametrizationList):
        return "a parametrised tensor"
    base, _, end = leaf.rpartition("_")
    if (
        end in ("orig", "g", "v")
        and base
        and base not in module._parameters
        and isinstance(getattr(module, base, None), Tensor)
    ):
        return base
    return None if leaf in module._parameters else leaf


def is_norm(module: Any) -> bool:
    """A normalisation with something to normalise: no Identity, no container."""
    name = type(module).__name__.lower()
    return isinstance(module, nn.Module) and "norm" in name and not list(module.children())


def is_plain_norm(module: nn.Module) -> bool:
    """A LayerNorm with a weight, whose forward is ``F.layer_norm`` of its tensors."""
    plain = type(module).forward in (nn.LayerNorm.forward, LayerNorm.forward)
    return plain and module.weight is not None and not getattr(module, "_fast_norm", False)


def is_plain_gelu(module: nn.Module) -> bool:
    """A GELU, exact or with tanh, as torch and timm have them."""
    return type(module).forward in (nn.GELU.forward, GELU.forward, GELUTanh.forward)


def reentrant_checkpointing() -> bool:
    """Whether timm's activation checkpointing is torch's reentrant kind, which sees no gradient but the input's."""
    return use_reentrant_ckpt()


def classifier_modules(model: nn.Module) -> list[ModuleRef]:
    """What stands where timm has the classifier(s) of a model; an Identity where there is none."""
    if not hasattr(model, "get_classifier"):
        return []
    found = model.get_classifier()
    found = found if isinstance(found, tuple | list) else (found,)
    paths = {id(m): n for n, m in model.named_modules()}
    return [ModuleRef(paths[id(m)], m) for m in found if id(m) in paths]


def outputs_of(head: nn.Module) -> int | None:
    """How many numbers a classifier gives of an image, where that can be read: a linear, or what ends with one."""
    if isinstance(head, nn.Sequential) and len(head):
        return outputs_of(head[-1])
    last = getattr(head, "fc", head)  # of timm's ClassifierHead
    return last.out_features if isinstance(last, nn.Linear) else None


def head_places(model: nn.Module) -> list[ModuleRef]:
    """The classifier module(s), as timm names them."""
    return [place for place in classifier_modules(model) if any(True for _ in place.module.parameters())]


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a forward in training mode changes the module's buffers: running means, and estimates of spectral norms."""
    if isinstance(module, _NormBase):
        return module.track_running_stats
    return isinstance(module, _SpectralNorm) or any(
        isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values()
    )
