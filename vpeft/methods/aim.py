"""AIM: the frozen attention run a second time along time, with adapters (Yang et al., ICLR 2023, arXiv 2302.03024)."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath
from torch import Tensor, nn

from ..backbone.attention import attend, attention_inputs, attention_output, before_projection, check_attention
from ..backbone.modules import FIRST, BlockSite, ModuleRef
from ..backbone.sites import Sites
from ..errors import MethodError, UnsupportedModelError
from ..interventions.base import ALONG_TIME, Intervention
from ..interventions.branch import AddToBranch
from ..interventions.context import Clip
from ..interventions.hooks import is_plain_linear
from ..interventions.output import MapOutput
from ..numerics import drops, leaner_backward, own_backward, unregistered
from ..options import nonnegative, option
from .base import Blocks, Method, Paper, count, register, which_blocks


class UpOfGelu(torch.autograd.Function):
    """gelu(h) W^T + b, of which h is kept and gelu(h) made anew for the gradient of W.

    Args (of ``apply``):
        h, weight, bias: (…, in), (out, in) and (out,).
    """

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(h, weight)
        return F.linear(F.gelu(h), weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        to_gelu = (grad @ weight.to(grad.dtype)).to(h.dtype)
        to_weight = rows.t() @ F.gelu(h).reshape(-1, h.shape[-1]).to(grad.dtype)
        return torch.ops.aten.gelu_backward(to_gelu, h), to_weight.to(weight.dtype), rows.sum(0, dtype=weight.dtype)


class _Adapter:
    """Gives an intervention the parts of A(z) = gelu(z Wd^T + bd) Wu^T + bu, which starts at 0."""

    def add_parts(self, width: int, size: int) -> None:
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)
        nn.init.trunc_normal_(self.down.weight, std=0.02)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def change(self, z: Tensor) -> Tensor:
        return self.upward(self.down(z))

    def change_behind(self, linear: nn.Linear, o: Tensor) -> Tensor:
        """A(linear(o)), which neither keeps nor needs what the linear gives: the two products follow each other."""
        weight, bias = self.down.weight @ linear.weight, self.down.bias
        if linear.bias is not None:
            bias = F.linear(linear.bias, self.down.weight, bias)
        return self.upward(F.linear(o, weight, bias))

    def upward(self, h: Tensor) -> Tensor:
        """gelu(h) Wu^T + bu."""
        if leaner_backward() and is_plain_linear(self.up):
            return UpOfGelu.apply(h, self.up.weight, self.up.bias)
        return self.up(F.gelu(h))


class AdapterBeforeTemporal(_Adapter, Intervention):
    """z + A(z) on what enters the temporal attention; ``Temporal`` calls it."""

    def __init__(self, block: BlockSite, size: int):
        super().__init__(block.index)
        self.place = block
        self.add_parts(block.width, size)

    def hooked(self) -> list[ModuleRef]:
        return [self.place]

    def install(self) -> None:
        pass

    def forward(self, z: Tensor) -> Tensor:
        return z + self.change(z)


class Temporal(_Adapter, MapOutput):
    """x + drop_path(A(attention(norm1(x) along time))), on the stream that enters the block."""

    no_decay = frozenset({"bias_table"})
    brings = frozenset({ALONG_TIME})

    def __init__(self, method: "AIM", block: BlockSite, clip: Clip, before: AdapterBeforeTemporal | None):
        super().__init__(block, block.index, on_input=True)
        check_attention(block)
        unregistered(self, clip=clip, before=before, spatial=None)
        self.norm1, self.attn = block.norm1, block.attn
        self.add_parts(block.width, block.width // method.reduction)
        self.drop_path = _drop_path(block.branch1)
        self.frames, self.bias_table = method.frames, None
        if block.maps:
            self.bias_table = nn.Parameter(torch.empty(2 * method.frames - 1, block.heads))
            nn.init.trunc_normal_(self.bias_table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.clip.length
        tokens = x.flatten(1, -2)  # (B T, N, D)
        z = rearrange(tokens, "(b t) n d -> (b n) t d", t=frames)
        # The modules' own forwards: hooks of other methods on them belong to the spatial pass.
        z = type(self.norm1.module).forward(self.norm1.module, z)
        if self.before is not None:
            z = self.before(z)
        z = self.attended(z)
        z = rearrange(z, "(b n) t d -> (b t) n d", n=tokens.shape[1])
        return x + self.drop_path(z.view(x.shape))

    def attended(self, z: Tensor) -> Tensor:
        """A of the block's attention among the T frames (B N, T, D) of each position, without rotation and spatial bias."""
        attn, bias = self.attn.module, None
        if self.bias_table is not None:
            time = torch.arange(z.shape[1], device=z.device)
            bias = self.bias_table[time[:, None] - time + self.frames - 1].permute(2, 0, 1)
        q, k, v = attention_inputs(attn, z)
        # One frame has itself alone to attend to: q and k need not be kept.
        y = v.contiguous() if bias is None and self._single(attn) else attend(attn, q, k, v, bias)
        if (
            is_projection_plain(self, attn, self.spatial)
            and self.hub.untouched(attn.proj_drop)
            and not drops(attn.proj_drop)
        ):
            return self.change_behind(attn.proj, before_projection(attn, y, z))
        return self.change(attention_output(attn, y, z))

    def _single(self, attn: nn.Module) -> bool:
        """Whether attention gives its values, and nothing else needs a gradient through the scores, be it 0."""
        if not own_backward() or self.clip.length > 1 or getattr(attn, "qkv", None) is None:
            return False
        if drops(attn.attn_drop) or (attn.training and getattr(attn.attn_drop, "p", 0) > 0):
            return False  # torch's fused attention goes by the attention's mode
        return not any(p.requires_grad for p in attn.parameters())


class Spatial(_Adapter, MapOutput):
    """y + A(y) on the output y of the attention module.

    Where y is what the frozen projection makes of o, A(y) is made of o, which the attention keeps for backward anyway.
    """

    def __init__(self, block: BlockSite, size: int):
        super().__init__(block.attn, block.index)
        self.projection = block.linears("proj")[0]
        self.add_parts(block.width, size)

    def hooked(self) -> list[ModuleRef]:
        return [*super().hooked(), self.projection]

    def install(self) -> None:
        super().install()
        self.act_after(self.projection, self._note)

    def _note(self, args: tuple, output: Tensor) -> None:
        # In fewer rows than channels the product of both weights costs more than the rows' own.
        rows = output.numel() // output.shape[-1]
        if leaner_backward() and rows >= output.shape[-1]:
            self.flow.put(self, "projected", (args[0], output, output._version))

    def forward(self, y: Tensor) -> Tensor:
        o, output, version = self.flow.pop(self, "projected") or (None, None, None)
        if y is output and y._version == version and self._nothing_between():
            return y + self.change_behind(self.projection.module, o)
        return y + self.change(y)

    def _nothing_between(self) -> bool:
        """Whether what the projection gave is y, and was not changed past autograd's counter either."""
        attn = self.place.module
        seen = self.hub.untouched(attn.proj_drop) and self.hub.untouched(attn, besides=self.owner)
        return seen and is_projection_plain(self, attn)


def is_projection_plain(part: _Adapter, attn: nn.Module, *beside: Intervention) -> bool:
    """Whether ``change_behind`` can do: an attention's last linear and the adapter's first are torch's own, and nobody does
    anything at the former but these, which only look.
    """
    if torch.compiler.is_compiling() or type(attn.proj).forward is not nn.Linear.forward or not is_plain_linear(part.down):
        return False
    return part.alone_at(attn.proj, *beside)


class Joint(_Adapter, AddToBranch):
    """drop_path(s A(n)) beside the MLP, n its normed input."""

    def __init__(self, method: "AIM", block: BlockSite, size: int):
        super().__init__(block, block.norm2, block.branch2, output=True)
        self.add_parts(block.width, size)
        self.scale, self.drop_path = method.scale, _drop_path(block.branch2)

    def forward(self, n: Tensor) -> Tensor:
        return self.drop_path(self.scale * self.change(n))


class TemporalEmbedding(MapOutput):
    """``temporal_embed`` (T, D): row t is added to every token of frame t."""

    no_decay = frozenset({"temporal_embed"})

    def __init__(self, sites: Sites, clip: Clip, frames: int):
        entrance = sites.entrance
        first = sites.blocks[0]
        super().__init__(entrance, first.index if entrance is first else FIRST, on_input=True)
        unregistered(self, clip=clip)
        self.temporal_embed = nn.Parameter(torch.zeros(frames, first.width))

    def forward(self, x: Tensor) -> Tensor:
        frames = self.clip.length
        return x + self.temporal_embed[:frames].repeat(x.shape[0] // frames, 1)[:, None]


def _drop_path(branch: ModuleRef) -> DropPath:
    """Its own draw per frame, at the rate of the branch it stands beside."""
    return DropPath(getattr(branch.module, "drop_prob", 0.0) or 0.0)


@register(
    "aim",
    Paper("AIM: Adapting Image Models for Efficient Video Action Recognition", "ICLR 2023", "2302.03024", "additive"),
    where="the block's attention along time, after attention and beside the MLP",
)
class AIM(Method):
    """A block's frozen attention first runs along time, among the frames at each position, then in space as always.

    With A(z) = up(gelu(down(z))): x + A_temporal(attn(norm1 x along time)), then y + A_spatial(y) on the attention's
    output, and scale A_joint(norm2 x) beside the MLP. The temporal and the joint adapter have a drop path, at the rate of
    the block's own. ``temporal_embed`` is added to the tokens of each frame. Rows are frames, (B T, C, H, W), those of a
    clip side by side; a single image is a clip of one frame.

    The temporal pass knows no place in the image: rotary embedding and relative-position bias are left out of it (ours;
    the paper has neither). On Swin, as in the official code, every second block of a stage (those without a shift) has a
    temporal pass, with a bias of its own per distance in time (``bias_table``, trained) in place of ``temporal_embed``.
    Another method's change of the linears inside attention (LoRA) acts in both passes; what acts at norm1 or at the
    attention as a whole (prefixes) acts in the spatial pass alone.

    Args:
        frames: T of a clip.
        reduction: width over the adapters' hidden width.
        scale: s of the joint adapter.
        num_t_adapters: 1, or 2 with one, z + A(z), before the temporal attention too (Something-Something).
        blocks: which blocks; None for all.
    """

    frames: int = count(8, "frames")
    reduction: int = count(4)
    scale: float = nonnegative(0.5)
    num_t_adapters: int = option(1, ge=1, le=2, unit="adapters")
    blocks: Blocks = which_blocks()

    presets = {"kinetics": {}, "ssv2": {"frames": 32, "num_t_adapters": 2}}

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        clip = Clip(sites, self.frames, fixed=True)
        yield "clip", clip
        if not sites.blocks[0].maps:
            yield "aim", TemporalEmbedding(sites, clip, self.frames)
        first = {}
        for block in sites.blocks:
            first.setdefault(block.stage, block.index)
        for block in sites.choose(self.blocks):
            if not block.pre_norm:
                raise UnsupportedModelError(f"{block.path} is norm-after-branch: its norm1 makes no input for the attention")
            size = block.width // self.reduction
            if not size:
                raise MethodError(f"{self.name}.reduction: {self.reduction} leaves nothing of {block.width} channels")
            path, temporal = f"{block.path}.aim", None
            if not block.maps or (block.index - first[block.stage]) % 2 == 0:
                before = AdapterBeforeTemporal(block, size) if self.num_t_adapters == 2 else None
                temporal = Temporal(self, block, clip, before)
                yield f"{path}.temporal", temporal
                if before is not None:
                    yield f"{path}.temporal_in", before
            spatial = Spatial(block, size)
            if temporal is not None:
                unregistered(temporal, spatial=spatial)
            yield f"{path}.spatial", spatial
            yield f"{path}.joint", Joint(self, block, size)
