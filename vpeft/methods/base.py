"""What a method is: a small dataclass of hyper-parameters, registered by name, that yields interventions."""

import dataclasses
import types
import typing
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor

from ..backbone.modules import LAST, BlockSite, LinearSite
from ..backbone.sites import Sites
from ..errors import MethodError, VpeftError, did_you_mean
from ..interventions.base import Intervention
from ..interventions.context import Grid
from ..interventions.weights import ExistingTensors

if TYPE_CHECKING:
    from ..tuning.handle import Handle

Blocks = str | int | list[int] | None
PerBlock = int | list[int]


@dataclass(frozen=True)
class Paper:
    """Where a method was published.

    Attributes:
        title, venue: of the paper.
        arxiv: its arXiv id, or "" where there is none.
        category: of the survey arXiv 2501.13787: additive, prompt, reparameterisation, selective, hybrid, side.
        vtab: published VTAB-1k result with its source, "" where none is known.
    """

    title: str
    venue: str
    arxiv: str
    category: str
    vtab: str = ""

    def __str__(self) -> str:
        return f"{self.title}, {self.venue}" + (f", arXiv {self.arxiv}" if self.arxiv else "")


@dataclass
class Method:
    """Base of all methods: subclasses add their hyper-parameters and ``build``.

    Attributes:
        presets: named sets of hyper-parameters, as published somewhere; ``attach(model, name, preset="…")``.
    """

    name: ClassVar[str]
    paper: ClassVar[Paper]
    where: ClassVar[str]
    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        """Yield ``(path, intervention)``: the path is where its tensors stand in the state dict.

        Raises:
            UnsupportedModelError: the model lacks what the method acts on.
        """
        raise NotImplementedError

    @property
    def starts_as_identity(self) -> bool:
        """The adapted model computes what the bare one does until the first update."""
        return True

    def starts_as_identity_on(self, sites: Sites) -> bool:
        """``starts_as_identity`` on one model, for the methods where models differ."""
        return self.starts_as_identity

    @property
    def needs_calibration(self) -> bool:
        """It must look at data (``handle.calibrate``) before training.

        A method that looks at data has a function ``calibrate(handle, batches)``, where ``batches`` yields
        ``(images, labels)`` on the model's device and can be gone through several times.
        """
        return callable(getattr(self, "calibrate", None))

    @property
    def calibrates_each_epoch(self) -> bool:
        """``handle.calibrate`` is to be called again at the start of every epoch."""
        return False

    @property
    def trains_head(self) -> bool:
        """The classifier trains too."""
        return True

    def penalty(self, handle: "Handle") -> Tensor | None:
        """A term that the method adds to the task's loss, or None."""
        return None

    def after_step(self, handle: "Handle") -> None:
        """What the method does after each update, while the gradients are still there."""

    @property
    def compares_runs(self) -> bool:
        """``step_loss`` is to be called, and looks at the task's logits; a task that has none refuses the method."""
        return False

    def step_loss(self, logits: Tensor, again: Callable[[], Tensor]) -> Tensor | None:
        """A term that the method adds to a training step's loss, from what the model gave; None for none.

        Args:
            logits: (N, classes) of the step's batch, with their graph.
            again: runs the model once more on the same batch and gives these logits of it.
        """
        return None

    def notes(self, handle: "Handle") -> list[tuple[str, str]]:
        """Further lines of ``handle.summary()``, as (title, text)."""
        return []

    def exported(self, handle: "Handle") -> "tuple[Method, dict[str, Tensor]]":
        """The method and tensors that a file holds; simpler ones than in training where those compute the same."""
        return self, handle.state_dict()

    def options(self) -> dict[str, Any]:
        """The hyper-parameters, as plain values."""
        return dataclasses.asdict(self)

    def check(self) -> None:
        """Refuse impossible hyper-parameters; subclasses extend it."""
        for name in ("dropout", "drop_path"):
            value = getattr(self, name, 0)
            if not 0 <= value < 1:
                raise MethodError(f"{self.name}.{name}: {value} is no probability in [0, 1)")

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, tuple):
                value = list(value)
                setattr(self, f.name, value)
            elif isinstance(value, int) and not isinstance(value, bool) and hints[f.name] is float:
                setattr(self, f.name, float(value))
            if not _fits(value, hints[f.name]):
                raise MethodError(f"{self.name}.{f.name}: {value!r} is no {_readable(hints[f.name])}")
        self.check()

    def sized_blocks(self, sites: Sites, option: str, blocks: Blocks) -> Iterator[tuple[BlockSite, int]]:
        """The chosen blocks with their size of a per-block option; size 0 leaves a block out.

        A list holds one size for each block of the model, or one for each chosen block.
        """
        size: PerBlock = getattr(self, option)
        chosen = sites.choose(blocks)
        if isinstance(size, list):
            if len(size) == len(sites.blocks):
                sizes = [size[b.index] for b in chosen]
            elif len(size) == len(chosen):
                sizes = size
            else:
                raise MethodError(
                    f"{self.name}.{option}: {len(size)} sizes for {len(chosen)} chosen of {len(sites.blocks)} blocks"
                )
        else:
            sizes = [size] * len(chosen)
        for block, n in zip(chosen, sizes, strict=True):
            if n < 0:
                raise MethodError(f"{self.name}.{option}: {n} is no size")
            if n:
                yield block, n


def linears_by_path(block: BlockSite, targets: Iterable[str]) -> dict[str, list[LinearSite]]:
    """The linears behind the targeted slots; slots of one fused linear stand together."""
    found: dict[str, list[LinearSite]] = {}
    for slot in targets:
        for site in block.linears(slot):
            found.setdefault(site.path, []).append(site)
    return found


def tensors_of(sites: Sites, names: Iterable[str]) -> ExistingTensors:
    """The intervention that unfreezes tensors of the backbone by name."""
    names = list(names)
    return ExistingTensors(sites.model, names, min((sites.position(n) for n in names), default=LAST))


def grids(sites: Sites) -> Generator[tuple[str, Grid], None, Callable[[BlockSite], Grid]]:
    """Plants what measures the token map of each forward: one for all blocks of a ViT, one per block that sees a map.

    Used as ``grid_of_block = yield from grids(sites)`` in ``build``; the result gives a block's ``Grid``.
    """
    found: dict[str, Grid] = {}
    for block in sites.blocks:
        if block.maps:
            found[block.path] = Grid(sites, block)
            yield f"{block.path}.grid", found[block.path]
        elif "" not in found:
            found[""] = Grid(sites)
            yield "grid", found[""]
    return lambda block: found.get(block.path) or found[""]


METHODS: dict[str, type[Method]] = {}
ALIASES: dict[str, str] = {}
M = TypeVar("M", bound=type[Method])


def register(name: str, paper: Paper, where: str, aliases: tuple[str, ...] = ()):
    """Class decorator that makes a dataclass a method under ``name`` (and other names that people use for it)."""

    def decorate(cls: M) -> M:
        for taken in {name, *aliases} & (METHODS.keys() | ALIASES.keys()):
            raise MethodError(f"two methods are called '{taken}'")
        ALIASES.update(dict.fromkeys(aliases, name))
        cls = dataclass(cls)
        cls.name, cls.paper, cls.where = name, paper, where
        METHODS[name] = cls
        return cls

    return decorate


def create(method: "str | Method | type[Method]", *, preset: str | None = None, **options: Any) -> Method:
    """A method from its name and hyper-parameters, which go before those of a preset.

    Raises:
        MethodError: unknown name, unknown or impossible hyper-parameter, with the nearest valid one.
    """
    if isinstance(method, Method):
        if options or preset:
            raise MethodError("hyper-parameters belong to the method object, or to its name, not to both")
        return method
    cls = METHODS.get(ALIASES.get(method, method)) if isinstance(method, str) else method
    if cls is None:
        raise MethodError(f"unknown method '{method}'{did_you_mean(method, [*METHODS, *ALIASES])}")
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise MethodError(f"expected a method's name, class or object, got {type(method).__name__}")
    if preset is not None:
        if preset not in cls.presets:
            raise MethodError(f"{cls.name} has no preset '{preset}'{did_you_mean(preset, cls.presets)}")
        options = cls.presets[preset] | options
    known = {f.name for f in dataclasses.fields(cls)}
    for key in options:
        if key not in known:
            raise MethodError(f"{cls.name} has no hyper-parameter '{key}'{did_you_mean(key, known)}")
    return cls(**options)


def on_images(method: str) -> dict[str, Any]:
    """The hyper-parameters with which a method takes single images: one that acts along time gets clips of one frame."""
    cls = METHODS[ALIASES.get(method, method)]
    return {"frames": 1} if "frames" in {f.name for f in dataclasses.fields(cls)} else {}


def list_methods(category: str | None = None) -> list[str]:
    """Registered method names, of one category of the survey or of all.

    Raises:
        VpeftError: no method has this category.
    """
    categories = {m.paper.category for m in METHODS.values()}
    if category is not None and category not in categories:
        raise VpeftError(f"no category '{category}'{did_you_mean(category, categories)}")
    return sorted(n for n, m in METHODS.items() if category in (None, m.paper.category))


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, h) for h in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin is list:
        (inner,) = typing.get_args(hint)
        return isinstance(value, list) and all(_fits(v, inner) for v in value)
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is Any:
        return True
    return isinstance(value, hint)


def _readable(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(repr, typing.get_args(hint)))}"
    return str(hint).replace("typing.", "").replace("<class '", "").replace("'>", "")
