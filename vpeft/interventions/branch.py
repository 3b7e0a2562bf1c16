"""Additions to a residual branch."""

from torch import Tensor, nn

from ..backbone.modules import BlockSite, ModuleRef
from ..errors import UnsupportedModelError
from .base import Intervention


class AddToBranch(Intervention):
    """Adds ``forward(u)`` to the residual stream at the end of a branch, outside LayerScale and drop path.

    Args:
        block: where.
        reads: the module whose input is u.
        adds: the drop-path module whose output is the residual addition's operand.
        after: u is the stream after the branch instead, which is what was read plus the branch's output.
        output: u is the output of ``reads``.
    """

    held = frozenset({"_read"})

    def __init__(self, block: BlockSite, reads: ModuleRef, adds: ModuleRef, *, after: bool = False, output: bool = False):
        super().__init__(block.index)
        if block.windowed and adds is block.branch1:
            raise UnsupportedModelError(f"{block.path}: what its attention adds to the stream is still cut into windows")
        self.reads, self.adds, self.after, self.output = reads, adds, after, output
        self._read: Tensor | None = None

    def hooked(self) -> list[ModuleRef]:
        return [self.reads, self.adds]

    def install(self) -> None:
        if self.output:
            self.reads.module.register_forward_hook(self._hold_output)
        else:
            self.reads.module.register_forward_pre_hook(self._hold)
        self.adds.module.register_forward_hook(self._add)

    def _hold(self, module: nn.Module, args: tuple) -> None:
        if self.enabled:
            self._read = args[0]

    def _hold_output(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.enabled:
            self._read = output

    def _add(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if not self.enabled:
            return None
        u, self._read = self._read, None
        return output + self(u + output if self.after else u)
