"""ST-Adapter: bottlenecks with a depth-wise convolution over time and space (Pan et al., NeurIPS 2022, arXiv 2206.13559)."""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..backbone.modules import BlockSite, ModuleRef
from ..backbone.sites import Sites
from ..errors import MethodError
from ..interventions.base import OWN_ROWS, Intervention
from ..interventions.context import Clip, Grid
from ..interventions.output import MapOutput
from ..numerics import unregistered
from ..options import option
from .base import Blocks, Method, Paper, PerBlock, count, grids, per_block, register, which_blocks


class EditStream(Intervention):
    """Adds ``forward(u)`` to the residual stream u between a block's two branches.

    No module stands there: the change enters the second branch at its first module and the final sum at its end.
    """

    def __init__(self, block: BlockSite):
        super().__init__(block.index)
        self.enter, self.leave = block.mlp_input, block.branch2

    def hooked(self) -> list[ModuleRef]:
        return [self.enter, self.leave]

    def install(self) -> None:
        self.act_before(self.enter, self._edit)
        self.act_after(self.leave, self._add)

    def _edit(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        change = self(args[0])
        self.flow.put(self, "change", change)
        return (args[0] + change, *args[1:]), kwargs

    def _add(self, args: tuple, output: Tensor) -> Tensor:
        change = self.flow.pop(self, "change")
        if change is None:
            raise MethodError(f"{self.leave.path} was called, but {self.enter.path} before it was not")
        return output + change


class _STAdapter:
    """The parts of conv(x Wd^T + bd) Wu^T + bu on the patches of whole clips; prefix tokens get 0."""

    bars = frozenset({OWN_ROWS})

    def add_parts(self, method: "STAdapter", block: BlockSite, size: int, grid: Grid, clip: Clip) -> None:
        unregistered(self, grid=grid, clip=clip)
        self.down, self.up = nn.Linear(block.width, size), nn.Linear(size, block.width)
        padding = [k // 2 for k in method.kernel]
        self.conv = nn.Conv3d(size, size, method.kernel, padding=padding, groups=size)
        for tensor in (self.down.bias, self.up.bias, self.conv.weight, self.conv.bias):
            nn.init.zeros_(tensor)

    def change(self, x: Tensor) -> Tensor:
        height, width = self.grid.size
        tokens = x.flatten(1, -2)  # (B T, P + HW, D)
        prefix = tokens.shape[1] - height * width
        z = self.down(tokens[:, prefix:]).unflatten(0, (-1, self.clip.length))
        if self.conv.kernel_size[1:] == (1, 1):
            z = self.along_time(z)
        else:
            z = rearrange(z, "b t (h w) r -> b r t h w", h=height, w=width)
            z = rearrange(self.conv(z), "b r t h w -> b t (h w) r")
        return F.pad(self.up(z.flatten(0, 1)), (0, 0, prefix, 0)).view(x.shape)

    def along_time(self, z: Tensor) -> Tensor:
        """The convolution of (B, T, HW, r) where the kernel spans time alone, a sum over its taps: no layout is turned."""
        taps, middle = self.conv.weight.flatten(1).t().to(z.dtype), self.conv.kernel_size[0] // 2
        total = torch.addcmul(self.conv.bias.to(z.dtype), z, taps[middle])
        for step in range(1, middle + 1):
            total[:, step:].addcmul_(z[:, :-step], taps[middle - step])
            total[:, :-step].addcmul_(z[:, step:], taps[middle + step])
        return total


class STAdapterBeforeAttention(_STAdapter, MapOutput):
    """On the stream that enters the block."""

    def __init__(self, method: "STAdapter", block: BlockSite, size: int, grid: Grid, clip: Clip):
        super().__init__(block, block.index, on_input=True)
        self.add_parts(method, block, size, grid, clip)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.change(x)


class STAdapterBeforeMLP(_STAdapter, EditStream):
    """On the stream between attention and MLP."""

    def __init__(self, method: "STAdapter", block: BlockSite, size: int, grid: Grid, clip: Clip):
        super().__init__(block)
        self.add_parts(method, block, size, grid, clip)

    def forward(self, u: Tensor) -> Tensor:
        return self.change(u)


PLACES = {"attn": STAdapterBeforeAttention, "mlp": STAdapterBeforeMLP}


@register(
    "st_adapter",
    Paper(
        "ST-Adapter: Parameter-Efficient Image-to-Video Transfer Learning",
        "NeurIPS 2022",
        "2206.13559",
        "additive",
    ),
    where="the residual stream before attention and before the MLP, along time",
)
class STAdapter(Method):
    """An image model on single frames learns motion from bottlenecks whose depth-wise 3-D convolution sees whole clips.

    x + up(conv(down(x))) on the patch tokens, with no activation, before the block's norm; class and register tokens are
    left alone. Rows are frames, (B T, C, H, W), those of a clip side by side; the video task tells T, or
    ``vpeft.clips``. The convolution starts at zero, so only it has a gradient in the first step. Where the class token is
    pooled, the last block's adapter before the MLP reaches nothing and stays as it starts (so it does in the official
    code, whose count includes it). Published for ViTs; on Swin, our extension, the kernel moves over the map of each
    block.

    Args:
        bottleneck: r, one for all blocks or one per block (0: none there).
        kernel: of the convolution over (time, height, width); odd numbers.
        places: ``attn`` (before attention), ``mlp`` (before the MLP), or both.
        frames: T where nothing tells it; None for rows that are single frames.
        blocks: which blocks; None for all.
    """

    bottleneck: PerBlock = per_block(384, "channels")
    kernel: list[int] = option([3, 1, 1], ge=1, le=255, length=3)
    places: list[Literal["attn", "mlp"]] = option(["attn", "mlp"], length=(1, 2))
    frames: int | None = count(None, "frames")
    blocks: Blocks = which_blocks()

    presets = {"ssv2": {"places": ["attn", "mlp"]}, "kinetics": {"places": ["mlp"]}}

    def check(self) -> None:
        super().check()
        if any(k % 2 == 0 for k in self.kernel):
            raise MethodError(f"{self.name}.kernel: {self.kernel} is not three odd sizes (time, height, width)")

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        clip = Clip(sites, self.frames or 1)
        yield "clip", clip
        grid_of_block = yield from grids(sites)
        for block, size in self.sized_blocks(sites, "bottleneck", self.blocks):
            for place in dict.fromkeys(self.places):
                adapter = PLACES[place](self, block, size, grid_of_block(block), clip)
                yield f"{block.path}.st_adapter_{place}", adapter
