"""Maps of a module's output or input."""

from torch import Tensor

from ..backbone.modules import ModuleRef
from .base import Intervention


class MapOutput(Intervention):
    """Replaces a module's output y (or, with ``on_input``, its input) by ``forward(y)``."""

    def __init__(self, place: ModuleRef, position: int, *, on_input: bool = False):
        super().__init__(position)
        self.place, self.on_input = place, on_input

    def hooked(self) -> list[ModuleRef]:
        return [self.place]

    def install(self) -> None:
        if self.on_input:
            self.act_before(self.place, self._map_input)
        else:
            self.act_after(self.place, self._map_output)

    def _map_output(self, args: tuple, output: Tensor) -> Tensor | None:
        return self(output)

    def _map_input(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return (self(args[0]), *args[1:]), kwargs


class ForPooling(MapOutput):
    """A ``MapOutput`` at the final norm that only sets right what the pooling makes of the features.

    It is left out where the features are read as maps.
    """

    def skip(self) -> None:
        """What it has to do where it is left out: take what was kept for it."""

    def _left_out(self) -> bool:
        if not self.flow.facts.get("maps"):
            return False
        self.skip()
        return True

    def _map_output(self, args: tuple, output: Tensor) -> Tensor | None:
        return None if self._left_out() else super()._map_output(args, output)

    def _map_input(self, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        return None if self._left_out() else super()._map_input(args, kwargs)
