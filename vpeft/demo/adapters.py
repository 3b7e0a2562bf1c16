"""Several checkpoints attached to one backbone, which answer one after the other."""

import logging
import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .. import checkpoint
from ..data.images import IMAGE_ENDINGS
from ..engine.predict import config_of
from ..errors import CheckpointError, ConfigError, DataError, VpeftError
from ..tasks.prediction import check_preparation, names_of
from ..tasks.protocol import PredictOptions, Task, TaskModel
from ..tasks.registry import get_task
from ..tasks.restore import class_count, put_on
from ..tuning.handle import Handle
from .bare import Bare, shared_backbone

MOVING = (".gif", ".webp", ".avif")  # endings of images that may also hold a video
logger = logging.getLogger(__name__)
Colour = tuple[int, int, int]


@dataclass
class Answer:
    """What one adapter, or the bare backbone, says of a file.

    Attributes:
        title: of the adapter.
        about: method and size in a few words.
        classes: names and probabilities, best first; of a segmentation, names, shares of the pixels and colours.
        picture: (H, W, 3), uint8: the found classes laid over the image, where the task draws them.
        problem: why there is no answer.
    """

    title: str
    about: str = ""
    classes: list[tuple[str, float, Colour | None]] = field(default_factory=list)
    picture: np.ndarray | None = None
    problem: str = ""


@dataclass
class Attached:
    """One checkpoint on the shared backbone.

    Attributes:
        title: the run's name in its configuration, else the method's; another one than all others'.
        file: the checkpoint.
        task: made from its configuration.
        built: its model; the backbone in it is shared.
        handle: switched on for an answer only.
    """

    title: str
    file: checkpoint.File
    task: Task
    built: TaskModel
    handle: Handle

    @property
    def reads(self) -> str:
        """``image`` or ``video``."""
        return getattr(self.task, "reads", "image")

    @property
    def about(self) -> str:
        """The method and the number of its parameters, those of the head left out."""
        count = sum(p.numel() for p in self.handle.parameters())
        return f"{self.handle.method.name}, {count:,} parameters beside the head"


class Adapters:
    """Checkpoints of one backbone, each attached to it once; of any tasks whose backbone is the same to the bit.

    Handles are the model's, not a thread's: ``look`` switches them under a lock, so that any threads may call it.

    Args:
        paths: of the checkpoints, in the order in which they are shown; names of other places that a checkpoint may have.
        weights: a local file of the backbone's weights, where timm's own are neither cached nor to be downloaded.

    Raises:
        ConfigError: no checkpoint.
        CheckpointError: one that cannot be rebuilt, or that was trained on another backbone than the first; names it.
    """

    def __init__(self, paths: Sequence[str | Path], weights: str | None = None):
        if not paths:
            raise ConfigError("--ckpt: no checkpoint is given")
        if weights is not None and not Path(weights).is_file():
            raise ConfigError(f"--checkpoint: '{weights}' is no file")
        files = [checkpoint.read_header(path) for path in paths]
        for file in files:
            check_preparation(file)
        tasks = [get_task(config_of(file)) for file in files]
        self._lock = threading.Lock()
        self.backbone, names = shared_backbone(tasks[0], files[0], class_count(files[0]), weights)
        self.backbone.to("cuda" if torch.cuda.is_available() else "cpu")
        self.adapters: list[Attached] = []
        for title, file, task in zip(_titles(files), files, tasks, strict=True):
            self._attach(title, file, task)
        self.bare = self._bare(names)

    def _attach(self, title: str, file: checkpoint.File, task: Task) -> None:
        name = f"adapter{len(self.adapters)}"
        try:
            built, handle = put_on(task, file, self.backbone, name)
        except CheckpointError as error:
            if not self.adapters or "another backbone" not in str(error):
                raise
            raise CheckpointError(
                f"{error}; one page shows adapters of one backbone, here that of {self.adapters[0].file.path}"
            ) from error
        built.model.to(next(self.backbone.parameters()).device).eval()
        handle.eval().disable()
        self.adapters.append(Attached(title, file, task, built, handle))

    def _bare(self, names: Sequence[str] | None) -> dict[str, Bare]:
        """For each kind of file, the backbone with its own classes, if it has any, prepared as for the first adapter."""
        found: dict[str, Bare] = {}
        for adapter in self.adapters:
            if adapter.reads not in found and names:
                found[adapter.reads] = Bare(adapter.task, adapter.file, self.backbone, names)
        return found

    @property
    def titles(self) -> list[str]:
        """Of all adapters, in order."""
        return [adapter.title for adapter in self.adapters]

    @property
    def described(self) -> str:
        """The backbone in a few words."""
        model = checkpoint.model_metadata(self.backbone)
        return f"{model['name'] or model['class']}, {model['img_size'][0]}×{model['img_size'][1]} pixels"

    def preview(self, path: str | Path) -> list[np.ndarray]:
        """The image, or a few frames of the video, each (H, W, 3), uint8.

        Raises:
            DataError: a file that can be read neither as an image nor, where an adapter takes them, as a video.
        """
        kinds = {adapter.reads: adapter for adapter in reversed(self.adapters)}
        problem = f"{Path(path).name} is no {' or '.join(kinds)} file"
        for adapter in kinds.values():
            try:
                if not _wrong_kind(path, adapter.reads):
                    return adapter.task.preview(path)
            except DataError as error:
                problem = _without_folder(str(error), path)
        raise DataError(f"{problem}; the adapters here take {' and '.join(f'{kind}s' for kind in kinds)}")

    def look(self, path: str | Path, titles: Sequence[str] | None = None, topk: int = 5) -> list[Answer]:
        """What the bare backbone and each of the chosen adapters say of a file; what fails says why in its answer.

        Args:
            path: of an image, or of a video.
            titles: of the adapters; all where None.
            topk: classes that each answer holds at most.

        Raises:
            ConfigError: an adapter that is not there.
        """
        titles = self.titles if titles is None else list(titles)
        unknown = [t for t in titles if t not in self.titles]
        if unknown:
            raise ConfigError(f"no adapter is called '{unknown[0]}'; there are {', '.join(self.titles)}")
        chosen = [adapter for adapter in self.adapters if adapter.title in titles]
        answers = [self._bare_answer([adapter.reads for adapter in chosen or self.adapters], path, topk)]
        for adapter in chosen:
            answers.append(self._answer(Answer(adapter.title, adapter.about), adapter, adapter.reads, path, topk))
        return answers

    def _bare_answer(self, kinds: Sequence[str], path: str | Path, topk: int) -> Answer:
        """As an image, or as a video: whichever of these kinds the file turns out to be."""
        for kind in dict.fromkeys(kinds):
            bare = Answer("the bare backbone", "its own classes")
            answer = self._answer(bare, self.bare.get(kind), kind, path, topk)
            if not answer.problem:
                break
        return answer

    def _answer(self, answer: Answer, who: "Attached | Bare | None", kind: str, path: str | Path, topk: int) -> Answer:
        if who is None:
            answer.problem = "it has no classifier whose classes have names"
            return answer
        try:
            if _wrong_kind(path, kind):
                raise DataError(f"{path} is no {kind} file; {answer.title} takes {kind}s")
            with self._alone(who.handle if isinstance(who, Attached) else None):
                self._fill(answer, who, path, topk)
        except VpeftError as error:
            answer.problem = _without_folder(str(error), path)
        except Exception as error:  # whatever the model does with a strange file, the page goes on
            logger.exception("%s: no answer", answer.title)
            answer.problem = f"no answer: {type(error).__name__}: {_without_folder(str(error), path)}"
        return answer

    @contextmanager
    def _alone(self, handle: Handle | None) -> Iterator[None]:
        """One handle acts, or none, and no other thread switches meanwhile."""
        with self._lock, ExitStack() as stack:
            if handle is not None:
                stack.enter_context(handle.enable())
            yield

    def _fill(self, answer: Answer, who: "Attached | Bare", path: str | Path, topk: int) -> None:
        draws, found = getattr(who.task, "draws", True), who.file.metadata
        count = len(found["class_names"] or ()) or found["num_classes"] or topk
        options = PredictOptions(None if draws else min(topk, count), 1, built=who.built)
        with tempfile.TemporaryDirectory() as folder:
            row = next(iter(who.task.predict(who.file, [str(path)], replace(options, out=folder if draws else None))))
            if draws:
                _read_pictures(answer, row, names_of(who.file, who.task.num_classes), topk)
                return
        answer.classes = [(str(c["class"]), c["probability"], None) for c in row["classes"]]


def _read_pictures(answer: Answer, row: dict[str, Any], names: Sequence[str], topk: int) -> None:
    """The picture of a segmentation, and its classes with the colours that its mask's palette gives them."""
    with Image.open(row["overlay"]) as picture, Image.open(row["mask"]) as mask:
        answer.picture = np.asarray(picture.convert("RGB"))
        colours = np.asarray(mask.getpalette()).reshape(-1, 3)
    numbers = {name: i for i, name in enumerate(names)}
    shares = list(row["classes"].items())[: max(topk, 12)]  # a legend has to name what is seen
    answer.classes = [(name, share, tuple(colours[numbers[name]].tolist())) for name, share in shares]


def _titles(files: Sequence[checkpoint.File]) -> list[str]:
    """A title for each file: its run's name, or its method's; numbered where two are alike."""
    found: list[str] = []
    for file in files:
        title = (file.metadata["config"] or {}).get("name") or file.metadata["method"]["name"]
        number, free = 1, title
        while free in found:
            number, free = number + 1, f"{title} ({number + 1})"
        found.append(free)
    return found


def _wrong_kind(path: str | Path, kind: str) -> bool:
    """Whether a file's ending says that it is an image where a video is wanted; other files show what they are when read."""
    return kind == "video" and Path(path).suffix.lower() in IMAGE_ENDINGS and Path(path).suffix.lower() not in MOVING


def _without_folder(text: str, path: str | Path) -> str:
    """A message that names a file by its name alone: uploads lie in folders that tell a reader nothing."""
    return re.sub(re.escape(str(Path(path).parent)) + r"[/\\]", "", text)
