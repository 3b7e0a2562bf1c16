"""Where things are inside a timm transformer: its blocks in order, their norms, attention, linears and branch ends.

This is the only file that knows timm's insides. It looks at structure (which parts a module has, in which order they
run), never at model names, and proves what it read by one dry forward. What it cannot read it refuses, saying what is
missing.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, LayerNorm, PatchEmbed, apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention, window_partition, window_reverse
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from .errors import UnsupportedModelError, VpeftError, did_you_mean

IMAGE, FIRST, LAST = -2, -1, 10**9  # positions: the image, before all blocks, after all blocks
QKV_SLOTS = ("q", "k", "v")
SLOTS = ("qkv", *QKV_SLOTS, "proj", "fc1", "fc2")

# A block may have these parts and no other that holds parameters; anything else would act where we do not know of it.
_BLOCK_PARTS = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}


@dataclass(frozen=True, eq=False)
class Place:
    """A module of the model and its dotted path."""

    path: str
    module: nn.Module


@dataclass(frozen=True, eq=False)
class LinearSite(Place):
    """A frozen linear, or some of its output rows.

    Attributes:
        slot: what it computes: ``qkv``, ``q``, ``k``, ``v``, ``proj``, ``fc1`` or ``fc2``.
        rows: the output rows ``(start, stop)`` of the slot.
        bias_outside: the attention that adds its own q, k, v bias after this linear (BEiT, EVA, SwinV2), or None.
    """

    slot: str
    rows: tuple[int, int]
    bias_outside: Place | None = None

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
class BlockSite(Place):
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
    norm1: Place
    attn: Place
    branch1: Place
    norm2: Place
    mlp: Place
    branch2: Place

    @property
    def heads(self) -> int:
        """Attention heads."""
        return int(self.attn.module.num_heads)

    @property
    def head_width(self) -> int:
        """Channels of one head's keys and values."""
        return self.linears("v")[0].out_features // self.heads

    @property
    def mlp_input(self) -> Place:
        """The module whose input is the residual stream between the two branches."""
        return self.norm2 if self.pre_norm else self.mlp

    def gain(self, branch: int) -> Tensor | None:
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

    def _linear(self, parent: Place, name: str, slot: str) -> LinearSite:
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


class Sites:
    """What a method may act on in one model.

    Attributes:
        model: the timm model.
        blocks: its transformer blocks in forward order.
        prefix_tokens: class, distillation and register tokens in front of the patches (0 in Swin).
        patch_embed: the patch embedding's convolution or linear, or None.
        patch_norm: the norm after it, or None where there is none.
        final_norms: the norms between the last block and the classifier that are real (``norm``, ``fc_norm``).
        heads: the classifiers (two in a distilled DeiT; none with ``num_classes=0``).
        input_size: (channels, height, width) of the dry forward; (channels, frames, height, width) of a clip's.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.input_size = input_size(model)
        blocks = _find_blocks(model)
        self.blocks = _read_blocks(model, blocks, self.input_size)
        self.prefix_tokens = 0 if self.blocks[0].maps else int(getattr(model, "num_prefix_tokens", 0))
        embed = getattr(model, "patch_embed", None)
        self.patch_embed = self.patch_norm = None
        if isinstance(getattr(embed, "proj", None), nn.Conv2d | nn.Conv3d | nn.Linear):
            self.patch_embed = Place("patch_embed.proj", embed.proj)
        if embed is not None and is_norm(getattr(embed, "norm", None)):
            self.patch_norm = Place("patch_embed.norm", embed.norm)
        self.final_norms = [
            Place(name, getattr(model, name)) for name in ("norm", "fc_norm") if is_norm(getattr(model, name, None))
        ]
        self.heads = head_places(model)

    @property
    def image_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of the image, or of each frame of a clip, for methods that change or read pixels."""
        channels, *_, height, width = self.input_size
        return channels, height, width

    def choose(self, blocks: Any) -> list[BlockSite]:
        """The blocks that ``"8-11"``, ``"0,4,8-11"``, ``[0, 4]``, ``[-1]``, a number or None (all) names.

        Raises:
            VpeftError: a block that does not exist, or a text that is no list of numbers and ranges.
        """
        return [self.blocks[i] for i in block_indices(blocks, len(self.blocks))]

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The backbone's own parameters: not the classifier's, not what a method brought."""
        heads = tuple(f"{h.path}." for h in self.heads)
        for name, parameter in self.model.named_parameters():
            if not name.startswith(("vpeft.", *heads)):
                yield name, parameter

    def position(self, name: str) -> int:
        """The block that a tensor of the backbone acts in: FIRST before all blocks, LAST after them.

        What stands between two stages counts for the block before it, so that nothing below is taken for frozen.
        """
        for block in self.blocks:
            if name.startswith(f"{block.path}."):
                return block.index
        after = [f"{p.path}." for p in self.final_norms] + [f"{h.path}." for h in self.heads] + ["attn_pool."]
        if name.startswith(tuple(after)):
            return LAST
        parts = name.split(".")
        for depth in range(len(parts) - 1, 0, -1):
            inside = [b.index for b in self.blocks if b.path.startswith(".".join(parts[:depth]) + ".")]
            if inside:
                return max(min(inside) - 1, FIRST)
        return FIRST

    def boundary(self, position: int) -> str:
        """The path of the first module that needs a gradient, for a position."""
        if position == FIRST:
            return "patch_embed"
        if position < LAST:
            return self.blocks[position].path
        return next((p.path for p in [*self.final_norms, *self.heads]), "head")

    def span(self, name: str) -> tuple[Place, Place]:
        """(enter, leave): a tensor of the backbone is used between enter's input and leave.

        Both are the module that owns the tensor; where that is the model itself (class token, position embedding),
        they are the patch embedding and the first block, and its use ends where the block begins.
        """
        path = name.rpartition(".")[0]
        if path:
            place = Place(path, self.model.get_submodule(path))
            return place, place
        return self.stem, self.blocks[0]

    def merging_before(self, block: BlockSite) -> Place | None:
        """The patch merging between the stage before and this block, where this block is the first of its stage."""
        stage = block.path.rpartition(".")[0].rpartition(".")[0]
        first = block.index and self.blocks[block.index - 1].stage != block.stage
        merging = getattr(self.model.get_submodule(stage), "downsample", None) if first else None
        return Place(f"{stage}.downsample", merging) if isinstance(merging, nn.Module) else None

    @property
    def stem(self) -> Place:
        """The module that takes the image.

        Raises:
            UnsupportedModelError: there is none of that name.
        """
        embed = getattr(self.model, "patch_embed", None)
        if not isinstance(embed, nn.Module):
            raise UnsupportedModelError(f"{type(self.model).__name__} has no patch_embed that takes the image")
        return Place("patch_embed", embed)

    @property
    def entrance(self) -> Place:
        """The module whose input is the tokens with their positions: the norm before all blocks, or the first block."""
        norm = getattr(self.model, "norm_pre", None)
        return Place("norm_pre", norm) if is_norm(norm) else self.blocks[0]

    @property
    def features_end(self) -> Place:
        """The final norm, whose output is what ``forward_features`` gives; an Identity where pooling comes first.

        Raises:
            UnsupportedModelError: there is none of that name.
        """
        norm = getattr(self.model, "norm", None)
        if not isinstance(norm, nn.Module):
            raise UnsupportedModelError(f"{type(self.model).__name__} has no final norm, where its features end")
        return Place("norm", norm)

    @property
    def pooled(self) -> Place:
        """The dropout whose input is the pooled features, in front of the classifier; ``reset_classifier`` keeps it.

        Raises:
            UnsupportedModelError: there is none, or it has several classifiers.
        """
        for path in ("head_drop", "head.drop"):
            parent, _, leaf = path.rpartition(".")
            owner = getattr(self.model, parent, None) if parent else self.model
            if isinstance(getattr(owner, leaf, None), nn.Module) and len(self.heads) < 2:
                return Place(path, getattr(owner, leaf))
        raise UnsupportedModelError(f"{type(self.model).__name__} has no one place where pooled features enter a classifier")

    def norms(self) -> Iterator[Place]:
        """Every normalisation module of the backbone."""
        for path, module in self.model.named_modules():
            if is_norm(module) and not path.startswith("vpeft."):
                yield Place(path, module)


def is_norm(module: Any) -> bool:
    """A normalisation with something to normalise: no Identity, no container."""
    name = type(module).__name__.lower()
    return isinstance(module, nn.Module) and "norm" in name and not list(module.children())


def is_plain_norm(module: nn.Module) -> bool:
    """A LayerNorm with a weight, whose forward is ``F.layer_norm`` of its tensors."""
    plain = type(module).forward in (nn.LayerNorm.forward, LayerNorm.forward)
    return plain and module.weight is not None and not getattr(module, "_fast_norm", False)


def head_places(model: nn.Module) -> list[Place]:
    """The classifier module(s), as timm names them."""
    if not hasattr(model, "get_classifier"):
        return []
    found = model.get_classifier()
    found = found if isinstance(found, tuple | list) else (found,)
    paths = {id(m): n for n, m in model.named_modules()}
    return [Place(paths[id(m)], m) for m in found if id(m) in paths and any(True for _ in m.parameters())]


def head_paths(model: nn.Module) -> list[str]:
    return [h.path for h in head_places(model)]


def input_size(model: nn.Module) -> tuple[int, ...]:
    """(channels, height, width) that the model is built for; (channels, frames, height, width) where it takes clips."""
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    channels, height, width = cfg.get("input_size", (3, 224, 224))
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
    weights = next((m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)), None)
    frames = getattr(embed, "frames", None)
    clip = () if frames is None else (int(frames),)
    return (weights.in_channels if weights is not None else channels), *clip, int(height), int(width)


def block_indices(blocks: Any, depth: int) -> list[int]:
    """See ``Sites.choose``."""
    if blocks is None:
        return list(range(depth))
    if isinstance(blocks, str):
        chosen = []
        for part in blocks.replace(" ", "").split(","):
            first, dash, last = part.partition("-")
            if not first.isdigit() or (dash and not last.isdigit()):
                raise VpeftError(f"blocks: '{blocks}' is no list of blocks and ranges such as '8-11' or '0,4,8-11'")
            if dash and int(last) < int(first):
                raise VpeftError(f"blocks: the range '{part}' runs backwards")
            chosen += range(int(first), int(last if dash else first) + 1)
    else:
        chosen = [blocks] if isinstance(blocks, int) else list(blocks)
    for i in chosen:
        if isinstance(i, bool) or not isinstance(i, int) or not -depth <= i < depth:
            raise VpeftError(f"blocks: there is no block {i}; this model has blocks 0 to {depth - 1}")
    return sorted({i % depth for i in chosen})


# ---- reading a model ----


def _find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    found = []
    parents = {path: module for path, module in model.named_modules() if not path.startswith("vpeft")}
    almost: dict[str, str] = {}
    for path, module in parents.items():
        missing = [p for p in ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2") if not _has(module, p)]
        if missing:
            if _has(module, "attn"):  # an attention block of another shape; a convolution's norm1 is no matter
                owner = path
                while isinstance(parents[owner], nn.Sequential | nn.ModuleList | nn.ModuleDict):
                    owner = owner.rpartition(".")[0]
                almost.setdefault(type(parents[owner]).__name__, f"no {', '.join(missing)}")
            continue
        strange = [n for n, m in module.named_children() if n not in _BLOCK_PARTS and any(True for _ in m.parameters())]
        if strange:
            almost.setdefault(type(module).__name__, f"it also has {', '.join(strange)}")
            continue
        parent = parents[path.rpartition(".")[0]]
        if not isinstance(parent, nn.Sequential | nn.ModuleList):
            almost.setdefault(type(module).__name__, f"it is a part of {type(parent).__name__}")
            continue
        reason = _attention_reason(module.attn)
        if reason:
            almost.setdefault(type(module).__name__, reason)
            continue
        found.append((path, module))
    name = type(model).__name__
    if almost:
        text = "; ".join(f"{k}: {v}" for k, v in almost.items())
        raise UnsupportedModelError(f"{name} has blocks that cannot be read as norm1, attention, norm2, mlp ({text})")
    if not found:
        raise UnsupportedModelError(
            f"{name} has no transformer blocks: no module with norm1, attn, drop_path1, norm2, mlp and drop_path2"
        )
    return found


def _has(module: nn.Module, part: str) -> bool:
    return isinstance(getattr(module, part, None), nn.Module)


def _attention_reason(attn: nn.Module) -> str | None:
    """Why an attention's projections cannot be told apart, or None."""
    name = type(attn).__name__
    heads = getattr(attn, "num_heads", None)
    if not isinstance(getattr(attn, "proj", None), nn.Linear):
        return f"its {name} has no linear proj"
    qkv = getattr(attn, "qkv", None)
    if isinstance(qkv, nn.Linear):
        head_dim = getattr(attn, "head_dim", None) or getattr(attn, "dim_head", None)
        if heads is None or qkv.out_features % 3 or (qkv.out_features // 3) % heads:
            return f"its {name}.qkv does not split into queries, keys and values"
        if isinstance(head_dim, int) and qkv.out_features % (3 * head_dim):
            return f"its {name}.qkv does not split into heads of {head_dim}"
        return None
    if all(isinstance(getattr(attn, f"{s}_proj", None), nn.Linear) for s in QKV_SLOTS):
        return None
    return f"its {name} has neither a linear qkv nor q_proj, k_proj and v_proj"


def _read_blocks(model: nn.Module, found: list[tuple[str, nn.Module]], size: tuple) -> list[BlockSite]:
    """Watch one dry forward: which blocks run, in which order, on which layout, and where their norms stand."""
    order: list[int] = []
    inputs: dict[int, Tensor] = {}
    pre_norm: dict[int, bool] = {}
    maps: dict[int, bool] = {}
    widths: dict[int, int] = {}
    windowed: dict[int, bool] = {}
    handles = []
    for i, (_, block) in enumerate(found):

        def enter(module, args, kwargs, i=i):
            x = args[0] if args else kwargs["x"]
            order.append(i)
            inputs[i], maps[i], widths[i] = x, x.ndim == 4, x.shape[-1]

        def norm(module, args, i=i):
            # The same numbers at the same place: norm1 reads the block's input, so the block is pre-norm.
            pre_norm[i] = i in inputs and args[0].shape == inputs[i].shape and args[0] is inputs[i]

        def end(module, args, output, i=i):
            windowed[i] = i in inputs and output.shape != inputs[i].shape

        handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(block.norm1.register_forward_pre_hook(norm))
        handles.append(block.drop_path1.register_forward_hook(end))
    try:
        dry_forward(model, size, again=order.clear)
    finally:
        for handle in handles:
            handle.remove()
    if sorted(order) != list(range(len(found))):
        lost = sorted(set(range(len(found))) - set(order)) or sorted({i for i in order if order.count(i) > 1})
        paths = ", ".join(found[i][0] for i in lost[:4])
        raise UnsupportedModelError(f"{type(model).__name__}: blocks that do not run exactly once in a forward: {paths}")
    stages: dict[str, int] = {}
    blocks = []
    for index, i in enumerate(order):
        path, block = found[i]
        stage = stages.setdefault(path.rpartition(".")[0], len(stages))
        parts = {
            field: Place(f"{path}.{name}", getattr(block, name))
            for field, name in (
                ("norm1", "norm1"), ("attn", "attn"), ("branch1", "drop_path1"),
                ("norm2", "norm2"), ("mlp", "mlp"), ("branch2", "drop_path2"),
            )
        }  # fmt: skip
        facts = (pre_norm.get(i, False), maps[i], windowed.get(i, False))
        blocks.append(BlockSite(path, block, index, stage, widths[i], *facts, **parts))
    return blocks


@contextmanager
def _evaluating(model: nn.Module):
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def dry_forward(
    model: nn.Module,
    size: tuple[int, ...],
    run: Callable[[Tensor], Any] | None = None,
    again: Callable[[], None] | None = None,
) -> Any:
    """One forward of no image, or of one blank image, without gradients, in eval mode, on the model's device and dtype.

    A batch of no images has all shapes and calls all modules, and costs next to nothing; where something cannot do with
    that, one image is taken.

    Args:
        model: the model.
        size: of the image.
        run: in the model's place.
        again: called before the second attempt, to forget what was seen in the first.

    Returns what the model, or ``run``, gave.

    Raises:
        UnsupportedModelError: the model does not take an image of its own size.
    """
    reference = next((p for p in model.parameters() if p.is_floating_point()), None)
    with _evaluating(model), torch.no_grad():
        image = torch.zeros(1, *size, dtype=reference.dtype, device=reference.device)
        try:
            return (run or model)(image[:0])
        except Exception:  # of whatever class: the one image decides
            if again is not None:
                again()
        try:
            return (run or model)(image)
        except VpeftError:
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"a dry forward of {type(model).__name__} on a {'x'.join(map(str, size))} image failed: {error}"
            ) from error


def prove_alive(model: nn.Module, places: Iterable[Place], size: tuple[int, ...]) -> None:
    """One dry forward in which every given module must be called.

    Raises:
        UnsupportedModelError: names the modules whose forward is never called, so that a hook there does nothing.
    """
    dead = [p.path for p in never_called(model, places, size)]
    if dead:
        raise UnsupportedModelError(
            f"hooks at {', '.join(dead[:4])} would do nothing: {type(model).__name__} never calls "
            f"{'this module' if len(dead) == 1 else 'these modules'}"
        )


def never_called(
    model: nn.Module,
    places: Iterable[Place],
    size: tuple[int, int, int],
    run: Callable[[Tensor], Any] | None = None,
) -> list[Place]:
    """Those of the given modules that one dry forward of the model (or ``run``, of a part of it) does not call."""
    calls: dict[int, int] = {}
    unique = {id(p.module): p for p in places}

    def count(module, args, output):
        calls[id(module)] = calls.get(id(module), 0) + 1

    handles = [p.module.register_forward_hook(count) for p in unique.values()]
    try:
        dry_forward(model, size, run)
    finally:
        for handle in handles:
            handle.remove()
    return [p for key, p in unique.items() if key not in calls]


# ---- feature maps ----


def map_count(model: nn.Module) -> int:
    """How many outputs timm can give as maps: those of a plain ViT's blocks, of a hierarchical model's stages.

    Raises:
        UnsupportedModelError: timm gives none of this model's.
    """
    if not hasattr(model, "forward_intermediates") or not getattr(model, "feature_info", None):
        raise UnsupportedModelError(f"timm reads no feature maps of a {type(model).__name__} (no forward_intermediates)")
    return len(model.feature_info)


def has_class_token(model: nn.Module) -> bool:
    """Whether the first prefix token is a class token (else they are registers, or there are none)."""
    return getattr(model, "cls_token", None) is not None and int(getattr(model, "num_prefix_tokens", 0)) > 0


def read_maps(
    model: nn.Module, x: Tensor, indices: list[int], norm: bool = False, class_token: bool = False
) -> list[tuple[Tensor, Tensor | None]]:
    """Maps (B, C, H, W) of an image x (B, 3, H', W') and, where wanted, the class tokens (B, C) beside them.

    The last of all possible maps is taken where ``forward_features`` ends, behind the final norm, since that is where side
    networks come back; the others are what the blocks (or stages) give.

    Args:
        model: a timm model.
        x: normalised images.
        indices: which maps, of ``map_count``, in ascending order.
        norm: the final norm on the others too, in models of one width.
        class_token: see above.
    """
    options: dict[str, Any] = {"indices": indices, "norm": norm}
    if class_token:
        options["return_prefix_tokens"] = True
    features = None
    if indices[-1] == map_count(model) - 1:
        features, found = model.forward_intermediates(x, **options)
    else:
        found = model.forward_intermediates(x, stop_early=True, intermediates_only=True, **options)
    pairs = [(y, prefix[:, 0]) for y, prefix in found] if class_token else [(y, None) for y in found]
    if features is not None:
        height, width = pairs[-1][0].shape[-2:]
        token = features[:, 0] if class_token else None
        if features.ndim == 3:
            patches = features[:, features.shape[1] - height * width :]
            features = patches.transpose(1, 2).unflatten(2, (height, width))
        elif getattr(model, "output_fmt", "NCHW") == "NHWC":
            features = features.permute(0, 3, 1, 2)
        pairs[-1] = features.contiguous(), token
    return pairs


# ---- timm's attentions in three steps, for methods that change what happens between them ----

_ATTENTIONS = (Attention, AttentionRope, BeitAttention, EvaAttention, WindowAttention)


def check_attention(block: BlockSite) -> None:
    """Raise where ``attention_inputs``, ``attend`` and ``attention_output`` do not restate this attention.

    Raises:
        UnsupportedModelError: an attention of another class (cosine attention, differential attention …).
    """
    kind = type(block.attn.module)
    if kind.forward not in {c.forward for c in _ATTENTIONS}:
        known = ", ".join(sorted({f"{c.__module__.rpartition('.')[2]}.{c.__name__}" for c in _ATTENTIONS}))
        raise UnsupportedModelError(
            f"{block.attn.path}: keys and values cannot be added to a {kind.__module__.rpartition('.')[2]}.{kind.__name__}"
            f"; known: {known}"
        )


def check_sequence(block: BlockSite) -> None:
    """Raise where tokens cannot stand in the sequence that a block sees.

    Raises:
        UnsupportedModelError: the block sees a map, or its attention has a bias made for a fixed number of tokens.
    """
    attn = block.attn.module
    if block.maps:
        raise UnsupportedModelError(f"{block.path} sees a map of patches, in which further tokens have no place")
    if isinstance(getattr(attn, "rel_pos", None), nn.Module):
        raise UnsupportedModelError(
            f"{block.attn.path}: the relative position bias of {type(attn).__name__} has no rows for further tokens"
        )


def attention_inputs(attn: nn.Module, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, heads, N, d) of tokens x (B, N, D), normed and rotated as the attention does."""
    if getattr(attn, "qkv", None) is not None:
        bias = separate_bias(attn)
        if bias is None:
            y = attn.qkv(x)
        elif attn.qkv_bias_separate:
            y = attn.qkv(x) + bias
        else:
            y = F.linear(x, attn.qkv.weight, bias)
        q, k, v = y.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q = attn.q_proj(x).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        shared = getattr(attn, "num_kv_heads", attn.num_heads)  # grouped queries
        k, v = (p(x).unflatten(-1, (shared, -1)).transpose(1, 2) for p in (attn.k_proj, attn.v_proj))
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        start, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)
        q, k = (
            torch.cat([t[:, :, :start], apply_rot_embed_cat(t[:, :, start:], rope, half=half)], 2).type_as(v) for t in (q, k)
        )
    groups = getattr(attn, "num_kv_groups", 1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return q, k, v


def attention_bias(attn: nn.Module, **given: Any) -> Tensor | None:
    """What is added to the scores (…, N, N), or a boolean mask, from an attention's table and its call's keywords."""
    bias = given.get("attn_mask")
    if given.get("is_causal"):
        raise UnsupportedModelError("causal attention takes no further keys and values")
    for extra in (given.get("shared_rel_pos_bias"), _table_bias(attn)):
        if extra is not None:
            bias = extra if bias is None else bias + extra
    mask = given.get("mask")  # of shifted windows: (windows, N, N), for a batch that is ordered image by image
    if mask is not None:
        bias = bias + mask[:, None]
    return bias


def _table_bias(attn: nn.Module) -> Tensor | None:
    return attn._get_rel_pos_bias() if getattr(attn, "relative_position_bias_table", None) is not None else None


def attend(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T scale + bias) v: (B, heads, N, d). A bias of (W, heads, N, M) is repeated over B / W images."""
    if bias is not None and bias.ndim == 4 and 1 < bias.shape[0] < q.shape[0]:
        bias = bias.repeat(q.shape[0] // bias.shape[0], 1, 1, 1)
    if attn.fused_attn:
        dropout = attn.attn_drop.p if attn.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    scores = (q * attn.scale) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else scores + bias
    return attn.attn_drop(scores.softmax(-1)) @ v


def attention_output(attn: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    """From the heads' outputs y (B, heads, N, d) to (B, N, D); x is what the queries were made from (gates read it)."""
    y = y.transpose(1, 2).flatten(2)
    y = getattr(attn, "norm", nn.Identity())(y)
    gate = getattr(attn, "gate", None)
    if gate is not None:
        y = y * gate(x).sigmoid()
    return attn.proj_drop(attn.proj(y))


# ---- a plain block, for rows that read its tokens without being read ----

_BLOCKS = (Block, ResPostBlock, BeitBlock, EvaBlock, EvaBlockPostNorm)


def check_rows(block: BlockSite) -> None:
    """Raise where ``rows_through_block`` does not restate this block.

    Raises:
        UnsupportedModelError: a block of another class.
    """
    check_attention(block)
    kind = type(block.module)
    if kind.forward not in {c.forward for c in _BLOCKS}:
        known = ", ".join(sorted({f"{c.__module__.rpartition('.')[2]}.{c.__name__}" for c in _BLOCKS}))
        raise UnsupportedModelError(
            f"{block.path}: rows cannot be sent through a {kind.__module__.rpartition('.')[2]}.{kind.__name__} by "
            f"themselves; known: {known}"
        )


def rows_through_block(block: BlockSite, rows: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows (B, T, D) through a block whose tokens have the keys and values k, v (B, heads, N, d); T need not be N.

    The rows have no position: no rotation, and no relative-position bias towards any token. With a ``bias``
    (B, heads, T, N), which is added to their scores, each row attends to itself too.
    """
    m, attn = block.module, block.module.attn
    h = m.norm1(rows) if block.pre_norm else rows
    q, own_k, own_v = attention_inputs(attn, h)
    y = attend(attn, q, k, v) if bias is None else _attend_and_self(attn, q, (k, v), (own_k, own_v), bias)
    a = attention_output(attn, y, h)
    if block.pre_norm:
        one, two = (1 if (gain := block.gain(branch)) is None else gain for branch in (1, 2))
        rows = rows + m.drop_path1(one * a)
        return rows + m.drop_path2(two * m.mlp(m.norm2(rows)))
    rows = rows + m.drop_path1(m.norm1(a))
    return rows + m.drop_path2(m.norm2(m.mlp(rows)))


def _attend_and_self(attn: nn.Module, q: Tensor, others: tuple[Tensor, Tensor], own: tuple, bias: Tensor) -> Tensor:
    """Attention to others' keys and values under a bias, and to the row's own; no score between two rows is formed."""
    scores = (q * attn.scale) @ others[0].transpose(-2, -1) + bias
    self_score = (q * attn.scale * own[0]).sum(-1, keepdim=True)
    shares = attn.attn_drop(torch.cat([scores, self_score], -1).softmax(-1)).type_as(own[1])
    return shares[..., :-1] @ others[1] + shares[..., -1:] * own[1]


def keys_and_values(block: BlockSite, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values (B, heads, N, d) that a block's attention makes of tokens (B, N, D) entering the block."""
    h = block.module.norm1(tokens) if block.pre_norm else tokens
    return attention_inputs(block.module.attn, h)[1:]


def only_linears_hooked(block: BlockSite) -> bool:
    """True where a block's parts may be called one by one: no hook or changed forward but on its linears."""
    return not any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m)
        for m in block.module.modules()
        if not isinstance(m, nn.Linear)
    )


# ---- a plain ViT, for what runs its blocks itself ----


def check_plain_vit(model: nn.Module) -> None:
    """Raise where ``image_tokens``, the blocks in order and ``finished_rows`` do not restate this model.

    Raises:
        UnsupportedModelError: no plain ViT with class token and position embedding.
    """
    name = type(model).__name__
    kept = all(
        getattr(type(model), f, None) is getattr(VisionTransformer, f)
        for f in ("forward_features", "_pos_embed", "forward_intermediates")
    )
    if not kept or not isinstance(model.patch_embed, PatchEmbed):
        raise UnsupportedModelError(f"expected a plain ViT (timm's VisionTransformer), got {name}")
    for i, block in enumerate(model.blocks):
        if type(block).forward is not Block.forward or type(block.attn).forward is not Attention.forward:
            raise UnsupportedModelError(f"{name}.blocks.{i}: a {type(block).__name__} takes no attention bias from outside")
    if model.cls_token is None:
        raise UnsupportedModelError(f"this {name} has no class token")
    if model.pos_embed is None:
        raise UnsupportedModelError(f"this {name} has no position embedding")


def resized_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int = 0) -> Tensor:
    """A position embedding (1, prefix + old grid, D) for another grid; bicubic, not antialiased, as CLIP users do."""
    if tuple(old) == tuple(new):
        return positions
    grid = positions[:, prefix:].transpose(1, 2).unflatten(2, tuple(old))
    grid = F.interpolate(grid, size=tuple(new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :prefix], grid.flatten(2).transpose(1, 2)], 1)


def image_tokens(model: nn.Module, images: Tensor, positions: Tensor | None = None) -> tuple[Tensor, tuple[int, int]]:
    """What enters block 0 of a plain ViT, (B, prefix + h w, D), and (h, w), for images of any whole number of patches.

    Args:
        model: see ``check_plain_vit``.
        images: (B, C, H, W).
        positions: in place of the model's position embedding, of its shape.
    """
    stem = model.patch_embed
    strict, stem.strict_img_size = stem.strict_img_size, False  # The module itself is called, for the hooks on it.
    try:
        x = stem(images)
    finally:
        stem.strict_img_size = strict
    x = x.flatten(1, 2) if x.ndim == 4 else x
    grid = grid_of(stem, images.shape[-2:])
    first = [t.expand(len(x), -1, -1) for t in (model.cls_token, model.reg_token) if t is not None]
    placed = 0 if model.no_embed_class else model.num_prefix_tokens
    positions = resized_positions(model.pos_embed if positions is None else positions, stem.grid_size, grid, placed)
    x = torch.cat([*first, x + positions], 1) if model.no_embed_class else torch.cat([*first, x], 1) + positions
    return model.norm_pre(model.pos_drop(x)), grid


def finished_rows(model: nn.Module, rows: Tensor) -> Tensor:
    """Rows (B, T, D) that left a plain ViT's last block, through its final norm (in front of or after its pooling)."""
    return model.fc_norm(model.norm(rows))


# ---- Swin's block, for methods that send tokens of their own through it ----


def check_windows(block: BlockSite) -> None:
    """Raise where ``through_block`` does not restate this block.

    Raises:
        UnsupportedModelError: a block of another class (SwinV2's, say).
    """
    if type(block.module).forward is not SwinTransformerBlock.forward:
        raise UnsupportedModelError(
            f"{block.path}: tokens cannot join the windows of a {type(block.module).__module__.rpartition('.')[2]}."
            f"{type(block.module).__name__}; known: swin_transformer.SwinTransformerBlock"
        )


def through_block(block: nn.Module, x: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
    """A Swin block on a map x (B, H, W, C) whose every window also holds the tokens ``extra`` (B, P, C).

    The tokens' attention outputs are averaged over their sample's windows. The attention's relative-position bias must
    already be padded for P tokens in front. Returns the new map and the new tokens.
    """
    batch, height, width, channels = x.shape
    count = extra.shape[1]
    tokens = torch.cat([extra, x.flatten(1, 2)], 1)
    normed = block.norm1(tokens)
    inner = normed[:, count:].unflatten(1, (height, width))
    if any(block.shift_size):
        inner = inner.roll((-block.shift_size[0], -block.shift_size[1]), (1, 2))
    pad_h, pad_w = (-size % window for size, window in zip((height, width), block.window_size, strict=True))
    inner = F.pad(inner, (0, 0, 0, pad_w, 0, pad_h))
    mask = block.get_attn_mask(inner) if getattr(block, "dynamic_mask", False) else block.attn_mask
    windows = window_partition(inner, block.window_size).flatten(1, 2)  # image by image
    number = len(windows) // batch
    guests = normed[:, :count].repeat_interleave(number, 0)
    if mask is not None:
        mask = pad_pairs(mask, 0, count)
    out = block.attn(torch.cat([guests, windows], 1), mask=mask)
    guests = out[:, :count].unflatten(0, (batch, number)).mean(1)
    inner = out[:, count:].reshape(-1, *block.window_size, channels)
    inner = window_reverse(inner, block.window_size, height + pad_h, width + pad_w)[:, :height, :width]
    if any(block.shift_size):
        inner = inner.roll(block.shift_size, (1, 2))
    tokens = tokens + block.drop_path1(torch.cat([guests, inner.flatten(1, 2)], 1))
    tokens = tokens + block.drop_path2(block.mlp(block.norm2(tokens)))
    return tokens[:, count:].reshape(batch, height, width, channels), tokens[:, :count]


def through_merging(merging: nn.Module, tokens: Tensor) -> Tensor:
    """Tokens (B, P, C) through a patch merging, as if each were a patch of four equal ones: (B, P, 2C)."""
    return merging.reduction(merging.norm(tokens.repeat(1, 1, 4)))


# ---- small facts that methods ask for ----


def separate_bias(attention: nn.Module) -> Tensor | None:
    """The q, k, v bias that an attention adds outside its fused linear, as one vector."""
    if getattr(attention, "q_bias", None) is None:
        return None
    return torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))


def needs_separate_bias_call(attention: nn.Module) -> bool:
    """True where timm would bypass the module ``attn.qkv`` (so that hooks on it are dead)."""
    return getattr(attention, "q_bias", None) is not None and not getattr(attention, "qkv_bias_separate", True)


def pad_rope(rope: Tensor, tokens: int) -> Tensor:
    """Rotary table for ``tokens`` more rows in front that are not rotated; ``(…, N, 2 d)`` holds sines, then cosines."""
    half = rope.shape[-1] // 2
    shape = (*rope.shape[:-2], tokens)
    still = torch.cat([rope.new_zeros(*shape, half), rope.new_ones(*shape, half)], -1)
    return torch.cat([still, rope], -2)


def pad_pairs(bias: Tensor, prefix: int, tokens: int) -> Tensor:
    """A ``(…, N, N)`` bias or mask with zero (or True) rows and columns for ``tokens`` inserted after the prefix."""
    fill = bias.new_ones if bias.dtype == torch.bool else bias.new_zeros
    rows = fill(*bias.shape[:-2], tokens, bias.shape[-1])
    bias = torch.cat([bias[..., :prefix, :], rows, bias[..., prefix:, :]], -2)
    columns = fill(*bias.shape[:-1], tokens)
    return torch.cat([bias[..., :prefix], columns, bias[..., prefix:]], -1)


def grid_of(stem: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches that a patch embedding makes of an image of (height, width) pixels.

    Raises:
        UnsupportedModelError: it cannot tell.
    """
    if hasattr(stem, "dynamic_feat_size"):
        height, width = stem.dynamic_feat_size(size)
        return int(height), int(width)
    raise UnsupportedModelError(f"{type(stem).__name__} does not tell the grid that its patches stand in")


def patch_fan(sites: Sites) -> int:
    """Values of one patch of three channels: 3 * patch height * patch width, times its frames (VPT's initial bound)."""
    weight = sites.patch_embed.module.weight
    return 3 * math.prod(weight.shape[2:]) if weight.ndim > 2 else weight.shape[1]
