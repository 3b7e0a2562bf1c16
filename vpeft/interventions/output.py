"""Maps of a module's output or input."""

from torch import Tensor, nn

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
            self.place.module.register_forward_pre_hook(self._map_input)
        else:
            self.place.module.register_forward_hook(self._map_output)

    def _map_output(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        return self(output) if self.enabled else None

    def _map_input(self, module: nn.Module, args: tuple) -> tuple | None:
        return (self(args[0]), *args[1:]) if self.enabled else None


class ForPooling(MapOutput):
    """A ``MapOutput`` at the final norm that only sets right what the pooling makes of the features.

    Feature maps are read without it (``reading_maps``).
    """

    skipped = False

    def skip(self) -> None:
        """What it has to do where it is left out: take what was held for it."""

    def _left_out(self) -> bool:
        if self.enabled and self.skipped:
            self.skip()
        return self.skipped

    def _map_output(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        return None if self._left_out() else super()._map_output(module, args, output)

    def _map_input(self, module: nn.Module, args: tuple) -> tuple | None:
        return None if self._left_out() else super()._map_input(module, args)
