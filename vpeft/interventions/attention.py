"""Further keys and values of a block's attention."""

from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.attention import attend, attention_bias, attention_inputs, attention_output, check_attention
from ..backbone.modules import BlockSite, ModuleRef
from ..shards import possible
from .base import Intervention, replacing
from .operation import Inner


def attend_with_prefixes(inner: Inner, prefixes: list["AttentionPrefix"], x: Tensor, *args: Tensor, **kwargs: Any) -> Tensor:
    """The forward of one attention, as all that meet its keys and values change it together."""
    attn = inner.module
    if args:  # by their names in timm: Swin's mask, BEiT's shared bias
        names = type(attn).forward.__code__.co_varnames[2 : 2 + len(args)]
        kwargs |= dict(zip(names, args, strict=True))
    q, k, v = attention_inputs(attn, x, kwargs.get("rope"))
    bias = attention_bias(attn, **{n: t for n, t in kwargs.items() if n != "rope"})
    extra = [pair for prefix in prefixes if (pair := prefix.meet(x, k, v)) is not None]
    if extra:
        tokens = sum(key.shape[-2] for key, _ in extra)
        if bias is not None:
            fill = bias.new_ones if bias.dtype == torch.bool else bias.new_zeros
            bias = torch.cat([fill(*bias.shape[:-1], tokens), bias], -1)
        batch = x.shape[0]  # not len(x), which torch.export takes for a constant
        keys, values = ([t.to(k.dtype).expand(batch, -1, -1, -1) for t in side] for side in zip(*extra, strict=True))
        k, v = torch.cat([*keys, k], 2), torch.cat([*values, v], 2)
        q = _by_itself(q, k) if attn.fused_attn else q  # else what is kept of it is scaled, and by itself
    return attention_output(attn, attend(attn, q, k, v, bias), x)


def _by_itself(q: Tensor, k: Tensor) -> Tensor:
    """Queries in memory of their own where they are a part of something larger, which they alone would keep for backward.

    The fused linear's output holds keys and values as well, of which there are copies beside the prefixes now.
    """
    recorded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    if not recorded or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return q
    if q._base is None or q._base.numel() <= q.numel():
        return q
    return q.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)  # in the order of (B, N, D)


class AttentionPrefix(Intervention):
    """What meets the keys and values of a block's attention, whose forward is replaced for it.

    ``meet(x, k, v)`` is called with the attention's input (B, N, D) and its own keys and values (B, heads, N, d), and
    gives further ones or None.
    """

    def __init__(self, block: BlockSite, position: int):
        super().__init__(position)
        check_attention(block)
        self.place = block.attn

    def meet(self, x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        raise NotImplementedError

    def hooked(self) -> list[ModuleRef]:
        return [self.place]

    def install(self) -> None:
        with replacing(self.place):
            self.hub.at(self.place.module).join(self.owner, attend_with_prefixes, self)


class PrefixKeysValues(AttentionPrefix):
    """Keys and values that every token attends to besides the tokens' own; they come in no position and make no rows.

    ``forward(x)`` gives key and value, each (heads, P, d) or (B, heads, P, d), from the attention's input x (B, N, D)
    (in Swin one window's tokens, windows in the batch). Relative-position bias and masks are 0 for them, rotary
    embedding and q/k norm do not touch them. Several methods' keys on one attention are concatenated.
    """

    def __init__(self, block: BlockSite):
        super().__init__(block, block.index)

    def meet(self, x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self(x)


class _Stored:
    """What was made of some tensors, and how to tell whether they are still what they were.

    A frozen tensor is known by its identity, address and version; a trained one by its value, since fused optimisers
    leave the version as it is.
    """

    def __init__(self, sources: list[Tensor], made: tuple[Tensor, Tensor]):
        self.sources, self.made = list(sources), made  # the caller may go on with the list
        self.half, self.states = self._half(), [self._state(t) for t in sources]

    def _half(self) -> torch.dtype | None:
        kind = self.sources[0].device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    @staticmethod
    def _state(tensor: Tensor) -> tuple:
        value = tensor.detach().clone() if tensor.requires_grad else None
        return tensor.data_ptr(), tensor._version, value

    def holds(self, sources: list[Tensor]) -> bool:
        """Whether the same would be made again."""
        if self.half != self._half() or len(sources) != len(self.sources):
            return False
        for tensor, before, (address, version, value) in zip(sources, self.sources, self.states, strict=True):
            if tensor is not before or tensor.data_ptr() != address or tensor._version != version:
                return False
            if tensor.requires_grad and (value is None or not torch.equal(tensor, value)):
                return False
        return True


def _tells_changes(tensor: Tensor) -> bool:
    """Whether a change of it can be seen: not on meta, fake and inference tensors, nor, without a wait, a GPU's value."""
    known = type(tensor) in (Tensor, nn.Parameter) and not (tensor.is_meta or tensor.is_inference())
    return known and (tensor.device.type == "cpu" or not tensor.requires_grad)


class ComputedKeysValues(PrefixKeysValues):
    """Keys and values that are the same for every sample of a batch, and are made of other tensors.

    ``make()`` gives them as in ``PrefixKeysValues``, once per forward, just before the block runs: hooks that hold
    something from the modules that it calls then hold the block's own. In eval mode, while no gradient is recorded, what
    was made is kept and used again until one of ``sources()`` changes (on a GPU: where none of them is set to train). torch
    does not tell of a change of a frozen tensor through ``tensor.data``; a forward that records gradients forgets what was
    kept.
    """

    def __init__(self, block: BlockSite):
        super().__init__(block)
        self.block = block
        # No state of a forward: it holds for all of them until a source changes. Threads may make it twice.
        self._stored: _Stored | None = None

    def make(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def sources(self) -> list[Tensor] | None:
        """Every tensor that they depend on, or None where that cannot be said (other methods act on the way)."""
        raise NotImplementedError

    def hooked(self) -> list[ModuleRef]:
        return [*super().hooked(), self.block]

    def install(self) -> None:
        super().install()
        self.act_before(self.block, self._prepare)

    def _prepare(self, args: tuple, kwargs: dict) -> None:
        self.flow.put(self, "made", self._recall())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made = self.flow.pop(self, "made")
        return self._recall() if made is None else made

    def _recall(self) -> tuple[Tensor, Tensor]:
        sources = None
        # Nor while another program is made of the forward: in that one they are made of its own tensors. Nor in shards: a
        # parameter that is gathered anew does not tell of a change.
        recorded = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
        if not (recorded or self.training or possible()):
            sources = self.sources()
        if sources is None or not all(_tells_changes(t) for t in sources):
            self._stored = None
            return self.make()
        stored = self._stored
        if stored is None or not stored.holds(sources):
            stored = self._stored = _Stored(sources, self.make())
        return stored.made

    def _apply(self, fn, recurse: bool = True) -> "ComputedKeysValues":
        self._stored = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        # Versions count the changes of one tensor, not of its copies.
        return {**self.__dict__, "_stored": None}
