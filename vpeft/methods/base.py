"""What a method is: a small dataclass of hyper-parameters, registered by name, that yields interventions."""

import contextlib
import copy
import dataclasses
import typing
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor

from ..attached.tree import Tree
from ..backbone.modules import LAST, SLOTS, BlockSite, LinearSite, ModuleRef
from ..backbone.sites import Sites
from ..errors import MethodError, VpeftError, did_you_mean, shown
from ..interventions.base import Intervention
from ..interventions.context import Grid
from ..interventions.weights import ExistingTensors
from ..options import SIZE, checked, declared, option
from .sums import total

Blocks = str | int | list[int] | None
PerBlock = int | list[int]
_DEEPEST = 1000  # blocks of a model; no model comes near


def which_blocks(default: Blocks = None, *, at_least: int = 1) -> Any:
    """A field for a choice of blocks, see ``Sites.choose``; an empty list is refused unless ``at_least`` is 0."""
    text = r"\s*[0-9]{1,4}\s*(-\s*[0-9]{1,4}\s*)?"
    return option(
        default, ge=-_DEEPEST, le=_DEEPEST, length=(at_least, _DEEPEST), pattern=f"{text}(,{text})*",
        free="a list of blocks and ranges such as '8-11' or '0,4,8-11'",
        words="a block (-1 is the last), a list of them, a text such as `8-11` or `0,4,8-11`, or none",
    )  # fmt: skip


def per_block(default: PerBlock | None, unit: str = "") -> Any:
    """A field for a size, one for all blocks or one for each of them; 0 leaves a block out."""
    return option(default, ge=0, le=SIZE, length=(1, _DEEPEST), unit=unit)


def count(default: int | None, unit: str = "", *, ge: int = 1) -> Any:
    """A field for one size or number of things, at least 1 if not said otherwise."""
    return option(default, ge=ge, le=SIZE, unit=unit)


def per_channel(*, ge: float | None = None) -> Any:
    """A field for one number for each channel of the image, or None."""
    return option(None, ge=ge, length=(1, _DEEPEST))


def slots(default: list[str]) -> Any:
    """A field for targeted linears of a block."""
    return option(default, choices=SLOTS)


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
    """Base of all methods: subclasses add their hyper-parameters, whose fields say what they may be, and ``build``.

    A method sees what the model has (``Sites``), once attached its own ``Tree``, and the task's loss; never the handle.

    Attributes:
        name: under which it is registered.
        paper: where it was published.
        where: what it acts on, in a few words for the tables of methods.
        unsaid: of a method of one's own, what its files mean that were saved before it got an option, by the option's name.
        starts_without_data: where no data are at hand for ``calibrate``, it trains from another start, with a warning.
        head_alone: only the classifier trains, on features that are the bare model's.
        presets: named sets of hyper-parameters, as published somewhere; ``attach(model, name, preset="…")``.
    """

    name: ClassVar[str]
    paper: ClassVar[Paper]
    where: ClassVar[str]
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    unsaid: ClassVar[dict[str, Any]] = {}
    starts_without_data: ClassVar[bool] = False
    head_alone: ClassVar[bool] = False

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

        A method that looks at data has a function ``calibrate(tree, batches)``, where ``batches`` yields
        ``(images, labels)`` on the model's device and can be gone through several times.
        """
        return callable(getattr(self, "calibrate", None))

    def looks_calibrated(self, tree: Tree) -> bool:
        """Whether its tensors can be what calibration left behind: what is loaded does not say whether there was one."""
        return True

    def without_calibration(self) -> str:
        """``option='value'`` with which it would need no calibration, or "" where there is no such option."""
        for this in declared(type(self)):
            for choice in typing.get_args(this.hint) if typing.get_origin(this.hint) is Literal else ():
                with contextlib.suppress(MethodError):  # choices that do not go with the other options
                    if not dataclasses.replace(self, **{this.name: choice}).needs_calibration:
                        return f"{this.name}={choice!r}"
        return ""

    @property
    def calibrates_each_epoch(self) -> bool:
        """``handle.calibrate`` is to be called again at the start of every epoch."""
        return False

    @property
    def trains_head(self) -> bool:
        """The classifier trains too."""
        return True

    def penalty(self, tree: Tree) -> Tensor | None:
        """A term that the method adds to the task's loss, or None."""
        return None

    def after_step(self, tree: Tree) -> None:
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

    def notes(self, tree: Tree) -> list[tuple[str, str]]:
        """Further lines of ``handle.summary()``, as (title, text)."""
        return []

    def exported(self, tree: Tree) -> "tuple[Method, dict[str, Tensor]]":
        """The method and tensors that a file holds; simpler ones than in training where those compute the same."""
        return self, tree.state()

    def summed(self, trees: Sequence[Tree], weights: Sequence[float]) -> "tuple[Method, dict[str, Tensor]]":
        """The method and its tensors that change the model by the sum of weight x what each of ``trees`` changes; exact.

        Args:
            trees: the first one's method is this one.
            weights: of any sign and sum.

        Raises:
            MethodError: no such tensors exist; says why.
        """
        return self, total(trees, weights)

    def follow_classifier(self, tree: Tree, heads: list[ModuleRef]) -> None:
        """Take up fresh classifiers, which ``reset_classifier`` has put into the model."""
        for intervention in tree.interventions:
            intervention.follow_classifier(heads)

    def options(self) -> dict[str, Any]:
        """The hyper-parameters, as plain values."""
        return dataclasses.asdict(self)

    def check(self) -> None:
        """Refuse hyper-parameters that do not go together; what each may be by itself stands on its field.

        Raises:
            MethodError: names them.
        """

    def __post_init__(self) -> None:
        for this in declared(type(self)):
            value = getattr(self, this.name)
            if value is None and isinstance(this.default, list):  # "the default", for callers that pass None along
                value = copy.copy(this.default)
            setattr(self, this.name, checked(this, value, f"{self.name}.{this.name}", MethodError))
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
        yield from ((block, n) for block, n in zip(chosen, sizes, strict=True) if n)


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
    """Yields what measures the token map in each forward: one for all blocks of a ViT, one per block that sees a map.

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


def create(method: "str | Method | type[Method]", /, *, preset: str | None = None, **options: Any) -> Method:
    """A method from its name and hyper-parameters, which go before those of a preset.

    Raises:
        MethodError: unknown name, unknown or impossible hyper-parameter, with the nearest valid one.
    """
    if isinstance(method, Method):
        if options or preset is not None:
            raise MethodError("hyper-parameters belong to the method object, or to its name, not to both")
        _check_named(type(method))
        method.__post_init__()  # its attributes may have been set since
        return method
    cls = METHODS.get(ALIASES.get(method, method)) if isinstance(method, str) else method
    if cls is None:
        raise MethodError(f"unknown method {shown(method)}{did_you_mean(method, [*METHODS, *ALIASES])}")
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise MethodError(f"expected a method's name, class or object, got {type(method).__name__}")
    _check_named(cls)
    if preset is not None:
        if not isinstance(preset, str) or preset not in cls.presets:
            raise MethodError(f"{cls.name} has no preset {shown(preset)}{did_you_mean(preset, cls.presets)}")
        options = cls.presets[preset] | options
    known = {f.name for f in dataclasses.fields(cls)}
    for key in options:
        if key not in known:
            raise MethodError(f"{cls.name} has no hyper-parameter {shown(key)}{did_you_mean(key, known)}")
    return cls(**options)


def _check_named(cls: type[Method]) -> None:
    """Refuse a class that no name leads to, such as the base of a family."""
    if not hasattr(cls, "name"):
        raise MethodError(f"{cls.__name__} is no method by itself: it has no name; see vpeft.list_methods()")


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
    if category is not None and (not isinstance(category, str) or category not in categories):
        raise VpeftError(f"no category {shown(category)}{did_you_mean(category, categories)}")
    return sorted(n for n, m in METHODS.items() if category in (None, m.paper.category))
