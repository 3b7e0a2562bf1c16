"""SSF: scale and shift the features (Lian et al., NeurIPS 2022, arXiv 2210.08823)."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone.attention import separate_bias
from ..backbone.modules import FIRST, LAST, LinearSite, ModuleRef, is_norm, is_plain_norm
from ..backbone.sites import Sites
from ..errors import MethodError
from ..interventions.base import Folded, Intervention
from ..interventions.fused import is_frozen_linear
from ..interventions.gathered import Gathered
from ..interventions.operation import Inner
from ..interventions.output import MapOutput
from ..interventions.scaled import ScaledLinear, Scales, ScaleShiftFunction, scaled_and_shifted, with_bias
from ..numerics import autocast_dtype, in_autocasts_type, leaner_backward, weighted_change, wide
from .base import Blocks, Method, Paper, linears_by_path, register, which_blocks


class ScalesNearZero:
    """Which of a method's scales have an entry near zero, through which nothing can be recovered.

    All are looked at together, once per forward: on a GPU that is one wait per step.
    """

    BOUND = 1e-3

    def __init__(self) -> None:
        self.parts: list[ScaleAndShift] = []

    @torch.no_grad()
    def has(self, part: "ScaleAndShift") -> bool:
        """Whether this one has."""
        near = part.flow.get(self, "near")
        if near is None:
            scales, near = [p.vectors()[0] for p in self.parts], frozenset()
            if torch.cat(scales).abs().min() < self.BOUND:
                near = frozenset(i for i, scale in enumerate(scales) if scale.abs().min() < self.BOUND)
            part.flow.put(self, "near", near)
        return self.parts.index(part) in near


class ScaleAndShift(MapOutput):
    """y -> scale * y + shift per channel, after a linear, a convolution or a norm; folds into its affine tensors.

    It keeps little for backward: a LayerNorm runs with its own affine vectors changed; after a linear, y is had back from
    the result, which activation and attention keep as well, or from the input.

    Args:
        place: the module.
        position: see ``Intervention``.
        channel_first: y is (B, C, …), as after a convolution.
        again: make y anew from the module's input, where that costs less memory than keeping the result.
        near_zero: shared by all of one method.
    """

    def __init__(
        self, place: ModuleRef, position: int, near_zero: ScalesNearZero, *, channel_first: bool = False, again: bool = False
    ):
        super().__init__(place, position)
        self.channel_first, self.again = channel_first, again
        self.outside = place.bias_outside if isinstance(place, LinearSite) else None
        self.near_zero = near_zero
        near_zero.parts.append(self)
        self.gathered: Gathered | None = None
        self.alike = self.is_linear = isinstance(place.module, nn.Linear)

    def calls_needed(self) -> list[ModuleRef]:
        return [self.outside] if self.outside else []

    def install(self) -> None:
        if is_plain_norm(self.place.module):
            self.act_around(self.place, self._run_norm)
        else:
            self.act_after(self.place, self._map_output)
            if isinstance(self.place.module, nn.Linear):
                self.act_at_once(self.place, self._in_one)

    def _in_one(self, x: Tensor) -> Tensor | None:
        if not self.pays(x) or self.outside is not None or not is_frozen_linear(self.place.module, x):
            return None
        if torch.is_grad_enabled() and self._keeps_y(x):
            return None
        module, dtype = self.place.module, autocast_dtype(x)
        scale, shift, *made = self._ready(x) or self.vectors()
        x = x if dtype is None else x.to(dtype)
        return ScaledLinear.apply(x, module.weight, module.bias, scale, shift, self.again, *made)

    def pays(self, x: Tensor) -> bool:
        """Whether the weight is scaled rather than the output: under autocast it is copied anyway, and on a GPU the output
        takes longer to move than the product to compute.
        """
        return x.is_cuda and autocast_dtype(x) not in (None, self.place.module.weight.dtype)

    def vectors(self) -> tuple[Tensor, Tensor]:
        """scale and shift, each (C,)."""
        raise NotImplementedError

    def _run_norm(self, inner: Inner, x: Tensor) -> Tensor:
        if not inner.alone:
            return self(inner(x), x)
        norm = self.place.module
        weight, bias = self._ready(x) or self._of_norm(*self.vectors(), norm.weight, norm.bias)
        return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)

    def _ready(self, x: Tensor) -> tuple[Tensor, ...] | None:
        return None if self.gathered is None else self.gathered.ready(self, x)

    @staticmethod
    def _of_norm(scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return weight * scale, with_bias(bias, scale, shift)

    def gathers(self) -> tuple[Tensor, ...]:
        """scale and shift, and the module's own tensors of the same size; none where others' hooks may make these."""
        module = self.place.module
        if not self.hub.hooked_by_it_alone(module):
            return ()
        own = (module.bias,) if self.is_linear else (module.weight, module.bias)
        return (*self.vectors(), *(t for t in own if t is not None))

    def made_ready(self, scale: Tensor, shift: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        """A norm's weight and bias; a linear's scale and shift, and what else ``ScaledLinear`` takes."""
        if not self.is_linear:
            return self._of_norm(scale, shift, *own)
        with torch.no_grad():
            moved = in_autocasts_type(with_bias(own[0] if own else None, scale, shift))
            zero, one = (scale.new_full(scale.shape[1:], n, dtype=torch.float32).expand(scale.shape) for n in (0, 1))
        return scale, shift, moved, zero, one, *Scales.apply(scale, shift, self.near_zero.BOUND)

    def _map_output(self, args: tuple, output: Tensor) -> Tensor:
        return self(output, args[0])

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """The module's new output from its output y and its input x."""
        scale, shift = self.vectors()
        if self.outside is not None:
            # timm adds the q, k, v bias after this output; it must be scaled as if it were inside.
            shift = shift + (scale - 1) * separate_bias(self.outside.module)
        axis = 1 if self.channel_first else y.ndim - 1
        if self._keeps_y(y):
            shape = (-1, *(1,) * (y.ndim - 1 - axis))
            return scaled_and_shifted(y, scale.view(shape), shift.view(shape))
        if self.again and self.alone_at(self.place.module):
            return ScaleShiftFunction.apply(y, scale, shift, axis, self._once_more, x)
        return ScaleShiftFunction.apply(y, scale, shift, axis, None, None)

    def _once_more(self, x: Tensor) -> Tensor:
        return type(self.place.module).forward(self.place.module, x)

    def _keeps_y(self, y: Tensor) -> bool:
        """Whether torch's own product has to do."""
        if not leaner_backward():
            return True
        # An attention with a bias outside its linear adds it to the result in place.
        return self.outside is not None or not self.vectors()[0].requires_grad or self.near_zero.has(self)

    def why_not_mergeable(self) -> str | None:
        """The reason why this pair cannot be folded here, or None."""
        module = self.place.module
        if self.outside is not None and self.outside.module.q_bias is not None:
            return f"{self.place.path}: the bias of k is a buffer that is not saved, so a folded shift of k would be lost"
        if getattr(module, "weight", None) is None:
            return f"{self.place.path} has no weight to fold into"
        if not hasattr(module, "bias"):
            return f"{self.place.path} ({type(module).__name__}) has no bias to fold the shift into"
        # torch's own layers accept a bias made later; a norm without one may not.
        if module.bias is None and not isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d | nn.LayerNorm):
            return f"{self.place.path} ({type(module).__name__}) takes no bias to fold the shift into"
        return None

    @property
    def mergeable(self) -> bool:
        return self.why_not_mergeable() is None

    def fold(self) -> list[Folded]:
        reason = self.why_not_mergeable()
        if reason:
            raise MethodError(f"cannot merge: {reason}")
        module = self.place.module
        weight, (scale, shift) = wide(module.weight), map(wide, self.vectors())
        bias = shift if module.bias is None else scale * wide(module.bias) + shift
        return [Folded(self.place, {"weight": scale.view(-1, *(1,) * (weight.ndim - 1)) * weight, "bias": bias})]


class ScaleShift(ScaleAndShift):
    """y * scale + shift, with scale ~ N(1, 0.02²) and shift ~ N(0, 0.02²) at the start."""

    no_decay = frozenset({"scale", "shift"})

    def __init__(self, place: ModuleRef, position: int, width: int, near_zero: ScalesNearZero, **how):
        super().__init__(place, position, near_zero, **how)
        self.scale = nn.Parameter(torch.empty(width).normal_(1, 0.02))
        self.shift = nn.Parameter(torch.empty(width).normal_(0, 0.02))

    def vectors(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.shift

    def summed(self, parts: "Sequence[ScaleShift]", weights: Sequence[float]) -> dict[str, Tensor]:
        """1 + the sum of w_i (scale_i - 1), and the sum of w_i shift_i."""
        scale = weighted_change([part.scale for part in parts], weights, 1.0)
        return {"scale": scale, "shift": weighted_change([part.shift for part in parts], weights, 0.0)}


@register(
    "ssf",
    Paper(
        "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning",
        "NeurIPS 2022",
        "2210.08823",
        "reparameterisation",
        vtab="73.10 mean of 19 tasks (75.69 group mean), the paper",
    ),
    where="output of the patch embedding, of every norm and every linear of the blocks, and of the final norm",
)
class SSF(Method):
    """One scale and one shift per channel after every frozen operation: y becomes y * scale + shift.

    Args:
        downsample: also after the norm of Swin's patch merging. The released models have none there, although their
            code means to.
        blocks: which blocks; None for all (and the patch embedding and the final norm, which a selection leaves out).
    """

    downsample: bool = False
    blocks: Blocks = which_blocks()

    @property
    def starts_as_identity(self) -> bool:
        return False

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        of_norms, of_linears = Gathered(cast=False), Gathered(cast=False)
        for path, part in self.pairs(sites):
            module = part.place.module
            if is_plain_norm(module) or (isinstance(module, nn.Linear) and part.outside is None):
                part.gathered = of_norms if is_plain_norm(module) else of_linears
                part.gathered.members.append(part)
            yield path, part

    def pairs(self, sites: Sites) -> Iterator[tuple[str, ScaleShift]]:
        """All scales and shifts, with their paths."""
        near = ScalesNearZero()
        if self.blocks is None:
            embed = sites.patch_projection
            if embed is not None:
                conv = isinstance(embed.module, nn.Conv2d | nn.Conv3d)
                width = embed.module.out_channels if conv else embed.module.out_features
                yield f"{embed.path}.ssf", ScaleShift(embed, FIRST, width, near, channel_first=conv)
            if sites.patch_norm is not None:
                yield f"{sites.patch_norm.path}.ssf", ScaleShift(sites.patch_norm, FIRST, sites.blocks[0].width, near)
        for block in sites.choose(self.blocks):
            places: list[tuple[ModuleRef, int]] = [(block.norm1, block.width)]
            places += self._linears(block, ("qkv", "proj"))
            places.append((block.norm2, block.width))
            places += self._linears(block, ("fc1",))
            inner = getattr(block.mlp.module, "norm", None)
            if is_norm(inner):
                places.append((ModuleRef(f"{block.mlp.path}.norm", inner), block.linears("fc2")[0].in_features))
            places += self._linears(block, ("fc2",))
            for place, width in places:
                # Nothing else keeps what goes into the residual stream. Made anew, proj's costs 3 % of a step in all
                # blocks; in every third, 1 %, and brings what is kept from 1.21 to 1.18 times the limit (ViT-S/16).
                again = place.path == f"{block.attn.path}.proj" and block.index % 3 == 0
                yield f"{place.path}.ssf", ScaleShift(place, block.index, width, near, again=again)
        if self.downsample:
            for norm in sites.norms():
                if norm.path.rpartition(".")[0].endswith("downsample"):
                    width = norm.module.weight.numel()
                    yield f"{norm.path}.ssf", ScaleShift(norm, sites.position(f"{norm.path}.weight"), width, near)
        if self.blocks is None and sites.final_norms:
            yield f"{sites.final_norms[0].path}.ssf", ScaleShift(sites.final_norms[0], LAST, sites.blocks[-1].width, near)

    @staticmethod
    def _linears(block, slots) -> list[tuple[ModuleRef, int]]:
        return [(sites[0], sites[0].out_features) for sites in linears_by_path(block, slots).values()]
