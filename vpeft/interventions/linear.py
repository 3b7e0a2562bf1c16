"""Additions to a frozen linear's output."""

from torch import Tensor

from ..backbone.modules import LinearSite, ModuleRef
from ..numerics import at_least_float32
from .base import Folded, Intervention
from .rows import RowPlan


class AddToLinear(Intervention):
    """``forward(x, y)`` gives the linear's new output from its input x and its frozen output y = x W^T + b.

    The change is linear in x: y plus x times a low-rank or structured matrix (``delta``), added in activation space so
    that autograd never forms a gradient of the whole weight.
    """

    mergeable = True

    def __init__(self, site: LinearSite, position: int):
        super().__init__(position)
        self.site = site

    def hooked(self) -> list[ModuleRef]:
        return [self.site]

    def calls_needed(self) -> list[ModuleRef]:
        return [self.site.bias_outside] if self.site.bias_outside else []

    def install(self) -> None:
        self.reads_input(self.site)
        self.act_after(self.site, self._update)

    def _update(self, args: tuple, output: Tensor) -> Tensor | None:
        return self(args[0], output)

    def _update_together(self, members: list["AddToLinear"], plan: RowPlan, args: tuple, output: Tensor) -> Tensor | None:
        return self.together(members, plan, args[0], output)

    def together(self, members: list["AddToLinear"], plan: RowPlan, x: Tensor, y: Tensor) -> Tensor | None:
        """``forward`` for samples that use different members of this class, or None where there is no such form."""
        return None

    def delta(self) -> Tensor:
        """The (rows, in) change of the whole linear's weight, in float32 or better."""
        raise NotImplementedError

    def fold(self) -> list[Folded]:
        weight = at_least_float32(self.site.module.weight.detach())
        return [Folded(self.site, {"weight": weight + self.delta().to(weight.dtype)})]
