"""Additions to a residual branch."""

from torch import Tensor

from ..backbone.modules import BlockSite, ModuleRef
from ..errors import MethodError, UnsupportedModelError
from .base import Intervention


class AddToBranch(Intervention):
    """Adds ``forward(u)`` to the residual stream at the end of a branch, outside LayerScale and drop path.

    Args:
        block: where.
        reads: the module whose input is u; of a block, the stream that enters its first branch.
        adds: the drop-path module whose output is the residual addition's operand.
        after: u is the stream after the branch instead, which is what was read plus the branch's output.
        output: u is the output of ``reads``.
    """

    def __init__(self, block: BlockSite, reads: ModuleRef, adds: ModuleRef, *, after: bool = False, output: bool = False):
        super().__init__(block.index)
        if block.windowed and adds is block.branch1:
            raise UnsupportedModelError(f"{block.path}: what its attention adds to the stream is still cut into windows")
        if reads is block and block.pre_norm and not output:
            reads = block.norm1  # where others' tokens are that exist within the block alone, in windows too
        self.reads, self.adds, self.joins, self.output = reads, adds, after, output

    def hooked(self) -> list[ModuleRef]:
        return [self.reads, self.adds]

    def install(self) -> None:
        if self.output:
            self.act_after(self.reads, self._keep_output)
        else:
            self.act_before(self.reads, self._keep, inside=2)
        self.act_after(self.adds, self._add)

    def _keep(self, args: tuple, kwargs: dict) -> None:
        self.flow.put(self, "read", args[0])

    def _keep_output(self, args: tuple, output: Tensor) -> None:
        self.flow.put(self, "read", output)

    def _add(self, args: tuple, output: Tensor) -> Tensor:
        u = self.flow.pop(self, "read")
        if u is None:
            raise MethodError(f"{self.adds.path} was called, but {self.reads.path}, whose tokens are added there, was not")
        return output + self(u + output if self.joins else u)
