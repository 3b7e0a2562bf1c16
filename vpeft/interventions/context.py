"""Facts of the present forward: the size of the token map, the frames of a clip."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from ..backbone.maps import grid_of
from ..backbone.modules import LAST, BlockSite, ModuleRef
from ..backbone.sites import Sites
from ..errors import MethodError, UnsupportedModelError
from .base import Folded, Intervention
from .lookup import hubs


class Watch(Intervention):
    """Looks at what enters a module and keeps a fact of it for the method's other parts; changes nothing.

    Subclasses say in ``_measure`` which fact.
    """

    mergeable = True

    def __init__(self, place: ModuleRef):
        super().__init__(LAST)
        self.place = place

    @property
    def inert(self) -> bool:
        return True

    def hooked(self) -> list[ModuleRef]:
        return [self.place]

    def install(self) -> None:
        self.act_before(self.place, self._look)

    def _look(self, args: tuple, kwargs: dict) -> None:
        self._measure(args[0] if args else kwargs["x"])

    def _measure(self, x: Tensor) -> None:
        raise NotImplementedError

    def fold(self) -> list[Folded]:
        return []


class Grid(Watch):
    """Height and width of the token map in the present forward (``size``): of a block's own map, or of the patches."""

    def __init__(self, sites: Sites, block: BlockSite | None = None):
        maps = block is not None and block.maps
        super().__init__(block if maps else sites.patch_embed)
        if not maps and sites.drops_patches:
            raise UnsupportedModelError(
                "patch_drop leaves out patches in training, and the method works on the whole map of them; "
                "build the model with patch_drop_rate=0"
            )
        self.maps, self.usual = maps, ()
        if not self.maps:  # refuses a patch embedding that cannot tell
            self.usual = grid_of(self.place.module, sites.input_size[-2:])

    def _measure(self, x: Tensor) -> None:
        size = tuple(x.shape[1:3]) if self.maps else grid_of(self.place.module, tuple(x.shape[-2:]))
        self.flow.put(self, "size", size)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width); where a block is called by itself, what images of the model's own size have."""
        return self.flow.get(self, "size") or self.usual


class Clip(Watch):
    """Frames per clip in the present forward (``length``), for methods that act along time.

    Rows are frames, those of one clip side by side: row b T + t. ``clips`` gives T for the forwards under it; else it is
    ``default``.

    Args:
        sites: of the model.
        default: T where nothing gives it.
        fixed: a clip has ``default`` frames, or is a single image; any other length is an error.
    """

    def __init__(self, sites: Sites, default: int = 1, *, fixed: bool = False):
        if len(sites.input_size) != 3:
            raise UnsupportedModelError(
                "the model's tokens span the clip already; this method is for models of single frames"
            )
        super().__init__(sites.patch_embed)
        self.default, self.fixed = default, fixed

    def _measure(self, x: Tensor) -> None:
        said, rows = self.flow.facts.get("frames"), x.shape[0]
        length = self.default if said is None else said
        if self.fixed and length not in (1, self.default):
            raise MethodError(
                f"clips of {length} frames, but the method is made for {self.default}: give it frames={length}"
            )
        if rows % length:
            raise MethodError(
                f"{rows} rows are no whole number of clips of {length} frames; give the rows (clips * frames, C, H, W) and "
                f"say how many frames a clip has: the method's option frames, or with vpeft.clips(model, frames=…)"
            )

    @property
    def length(self) -> int:
        """Frames of each clip."""
        said = self.flow.facts.get("frames")
        return self.default if said is None else said


@contextmanager
def clips(model: nn.Module, frames: int) -> Iterator[nn.Module]:
    """``with clips(model, frames=8): model(rows)`` lets rows (B * 8, C, H, W) be the frames of B clips, clip by clip.

    Methods that act along time read it; to all others it makes no difference. It holds for this thread.

    Args:
        model: a timm model with methods attached, or a module that holds one.
        frames: T of each clip.

    Raises:
        MethodError: ``frames`` is no positive number.
    """
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
        raise MethodError(f"clips: frames={frames!r} is no number of frames")
    with ExitStack() as stack:
        for hub in hubs(model):
            stack.enter_context(hub.saying(frames=frames))
        yield model
