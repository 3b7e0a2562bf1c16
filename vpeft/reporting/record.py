"""What a pass over a test split keeps of each sample: enough for tables and pictures, in memory that stays small.

Of 50,000 images of 1,000 classes these are 5 MB: of each its number, its true class, the predicted one and the five best
with their probabilities, and small copies of the few that were most confidently wrong.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor

from ..data.images import IGNORED, overlay
from ..data.loader import sample_names
from .calibration import Reliability

ALL = 20  # classes up to which every probability is kept; of more the best ``TOP``
TOP = 5
WORST = 24  # pictures that are kept
SIDE = 144  # pixels of their longer side


def sparing(add: Callable[..., None]) -> Callable[..., None]:
    """An ``add`` whose errors end the record and not the test: the metrics do not need it."""

    @wraps(add)
    def spared(self: "Record", *args: Any, **kwargs: Any) -> None:
        if self.failed:
            return
        try:
            add(self, *args, **kwargs)
        except Exception as error:
            self.failed, self.parts, self.worst = f"{type(error).__name__}: {error}", [], []

    return spared


class Record:
    """A loader whose batches are gone through once, and what a task tells of them; see ``LabelRecord`` and ``MaskRecord``.

    For tasks of one's own it has the loader's length and attributes too, such as ``dataset``.

    Args:
        loader: of the split, this process's share.
        classes: names.
        stats: ``mean`` and ``std`` of the normalised inputs, to show them.
        rank, world: this process, and how many there are.

    Attributes:
        columns: by name, one entry for each sample, sorted by the samples' numbers; there after ``gather``.
        worst: ``(badness, number, pictures)`` of the samples to show, the worst first.
        failed: why a batch could not be taken in, after which nothing is kept; else empty.
    """

    worst_count: ClassVar[int] = WORST

    def __init__(self, loader: Iterable, classes: Sequence[str], stats: dict[str, Any], *, rank: int = 0, world: int = 1):
        self.loader, self.classes, self.rank, self.world = loader, list(classes), rank, world
        self.mean, self.std = (
            torch.as_tensor(stats.get(k) or [v], dtype=torch.float32) for k, v in (("mean", 0), ("std", 1))
        )
        self.parts: list[dict[str, np.ndarray]] = []
        self.columns: dict[str, np.ndarray] = {}
        self.reliability = Reliability()
        self.worst: list[tuple[float, int, Any]] = []
        self.now: list[int] = []
        self.seen, self.failed = 0, ""

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "loader" or name.startswith("__"):  # not made yet, or asked for by copy and pickle
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for inputs, targets in self.loader:
            # A stream numbers its samples as they come.
            numbered = getattr(self.loader, "given", None)
            streamed = [(self.seen + i) * self.world + self.rank for i in range(len(targets))] if numbered is None else None
            self.now = streamed if numbered is None else numbered
            self.seen += len(targets)
            yield inputs, targets

    def _keep(self, **columns: np.ndarray) -> None:
        self.parts.append(columns)

    def _may_show(self, badness: Tensor, wrong: Tensor) -> list[int]:
        """Those rows of a batch that are among the worst so far."""
        least = self.worst[-1][0] if len(self.worst) >= self.worst_count else -float("inf")
        rows = (wrong & (badness > least)).nonzero().flatten()
        return rows[badness[rows].argsort(dim=0, descending=True, stable=True)][: self.worst_count].tolist()

    def _show(self, found: list[tuple[float, int, Any]]) -> None:
        self.worst = sorted(self.worst + found, key=lambda this: (-this[0], this[1]))[: self.worst_count]

    def gather(self) -> None:
        """Bring together what all processes have seen; each of them must call it."""
        failed = [reason for reason in gather_object([self.failed]) if reason]
        if failed:
            self.failed, self.parts = failed[0], []
            return
        held = gather_object([(self.parts, self.reliability.counts, self.worst, *self._more())])
        parts = [part for mine, *_ in held for part in mine]
        if parts:
            whole = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            _, first = np.unique(whole["index"], return_index=True)  # sorted, and no sample twice
            self.columns = {key: values[first] for key, values in whole.items()}
        self.reliability.counts = sum(counts for _, counts, *_ in held)
        self.worst = []
        self._show([one for _, _, worst, *_ in held for one in worst])
        self._take([more for _, _, _, *more in held])
        self.parts = []

    def _more(self) -> tuple:
        return ()

    def _take(self, held: list) -> None:
        """What ``_more`` gave in each process."""

    def names(self) -> list[str]:
        """What the samples are called: their files, or their numbers where they have none."""
        return sample_names(getattr(self.loader, "dataset", None), self.columns["index"]) if self.columns else []

    def name(self, index: int) -> str:
        """What one sample is called."""
        return sample_names(getattr(self.loader, "dataset", None), [index])[0]

    def numbers(self) -> dict[str, float]:
        """What goes beside the metrics: ``ece``, the expected calibration error in percent."""
        error = None if self.failed else self.reliability.error()
        return {} if error is None else {"ece": error}

    def thumbnail(self, inputs: Tensor) -> np.ndarray:
        """A small upright picture (h, w, 3), uint8, of one normalised input (C, H, W), (C, T, H, W) or (V, C, T, H, W)."""
        while inputs.ndim > 4:
            inputs = inputs[len(inputs) // 2]
        if inputs.ndim == 4:  # the middle frame
            inputs = inputs[:, inputs.shape[1] // 2]
        image = inputs.detach().float().cpu()
        if len(self.mean) in (1, len(image)) and len(self.std) in (1, len(image)):
            image = image * self.std[:, None, None] + self.mean[:, None, None]
        image = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
        height, width = image.shape[-2:]
        scale = SIDE / max(height, width)
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        image = F.interpolate(image[None], size, mode="bilinear" if scale < 1 else "nearest", antialias=scale < 1)[0]
        return (image.nan_to_num().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


class LabelRecord(Record):
    """Of samples with one label each: the true class, the predicted one, and probabilities.

    Columns: ``index``, ``true``, ``predicted``, ``confidence``; ``shares`` (N, classes) of at most ``ALL`` classes, else
    ``best`` (N, TOP) and ``best_shares``.
    A model with more or fewer outputs than there are classes has its outputs called by their numbers, in ``classes`` too.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.width = 0  # of the outputs

    @sparing
    def add(self, inputs: Tensor, scores: Tensor, shares: Tensor, labels: Tensor) -> None:
        """Take in the present batch.

        Args:
            inputs: normalised, (B, …).
            scores: (B, classes) by which samples are judged; the predicted class has the highest.
            shares: probabilities (B, classes).
            labels: (B,).
        """
        self.width = max(self.width, shares.shape[1])
        # Stable: of equal scores the first class counts, as in the metrics.
        best = scores.argsort(dim=1, descending=True, stable=True)[:, :TOP]
        predicted = best[:, 0]
        confidence = shares.gather(1, predicted[:, None])[:, 0]
        right = predicted == labels
        self.reliability.add(confidence, right)
        columns = {"true": labels, "predicted": predicted, "confidence": confidence}
        if shares.shape[1] <= ALL:
            columns["shares"] = shares
        else:
            columns |= {"best": best.int(), "best_shares": shares.gather(1, best)}
        index = np.asarray(self.now[: len(labels)])
        self._keep(index=index, **{k: v.cpu().numpy() for k, v in columns.items()})
        confidence, pairs = confidence.float().cpu(), torch.stack([labels, predicted], 1).tolist()
        self._show(
            [
                (float(confidence[i]), self.now[i], (pairs[i], self.thumbnail(inputs[i])))
                for i in self._may_show(confidence, ~right.cpu())
            ]
        )

    def _more(self) -> tuple:
        return (self.width,)

    def _take(self, held: list) -> None:
        width = max(width for (width,) in held)
        if width and width != len(self.classes):
            self.classes = [str(i) for i in range(width)]

    def confusion(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pairs (true class, predicted class) that occur, and how often each does: three arrays."""
        width = len(self.classes)
        pairs, counts = np.unique(self.columns["true"] * width + self.columns["predicted"], return_counts=True)
        return pairs // width, pairs % width, counts


class MaskRecord(Record):
    """Of images with a class for each pixel: the confusion matrix of all pixels, and how well each image was found.

    Columns: ``index``, ``pixels`` that are labelled, ``accuracy`` and ``miou`` (both in percent).
    """

    worst_count = 12

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.matrix = np.zeros((len(self.classes), len(self.classes)), np.int64)

    @sparing
    def add(
        self, images: Tensor, scores: Tensor, masks: Tensor, rows: Sequence[int], colours: list, *, logits: bool = True
    ) -> None:
        """Take in some images of the present batch.

        Args:
            images: normalised, (B, 3, h, w).
            scores: (B, classes, H, W).
            masks: class ids (B, H, W), 255 where not labelled.
            rows: where in the batch the images are.
            colours: of the classes.
            logits: the scores are logits, so that there are probabilities.
        """
        for image, score, mask, row in zip(images, scores, masks, rows, strict=True):  # one by one: less memory at once
            found, labelled = score.argmax(0), mask != IGNORED
            true, judged = mask[labelled], found[labelled]
            if logits:
                confidence = (score.amax(0) - score.logsumexp(0)).exp()[labelled]
                self.reliability.add(confidence, judged == true)
            pairs = torch.bincount(true * len(self.classes) + judged, minlength=self.matrix.size).cpu().numpy()
            matrix = pairs.reshape(self.matrix.shape)
            self.matrix += matrix
            hits, pixels = matrix.diagonal().sum(), matrix.sum()
            miou, accuracy = (
                100 * float(np.nanmean(_iou(matrix))) if pixels else np.nan,
                100 * hits / pixels if pixels else np.nan,
            )
            self._keep(
                index=np.asarray([self.now[row]]), pixels=np.asarray([pixels]), accuracy=np.asarray([accuracy]),
                miou=np.asarray([miou]),
            )  # fmt: skip
            if self._may_show(torch.tensor([-miou]), torch.tensor([pixels > 0])):
                self._show([(-miou, self.now[row], self._pictures(image, mask, found, colours))])

    def _pictures(self, image: Tensor, mask: Tensor, found: Tensor, colours: list) -> np.ndarray:
        """The image, its true classes and the found ones laid over it, side by side."""
        shown = self.thumbnail(image)
        masks = torch.stack([mask, found]).float()[None].cpu()
        truth, judged = F.interpolate(masks, shown.shape[:2], mode="nearest")[0].long().numpy()
        return np.concatenate([shown, overlay(shown, truth, colours), overlay(shown, judged, colours)], 1)

    def _more(self) -> tuple:
        return (self.matrix,)

    def _take(self, held: list) -> None:
        self.matrix = sum(matrix for (matrix,) in held)

    def confusion(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pairs (true class, found class) of pixels that occur, and how often each does: three arrays."""
        true, found = self.matrix.nonzero()
        return true, found, self.matrix[true, found]


def _iou(matrix: np.ndarray) -> np.ndarray:
    """Intersection over union of each class of a confusion matrix; NaN for one that neither occurs nor is found."""
    hit = matrix.diagonal()
    with np.errstate(invalid="ignore"):
        return hit / (matrix.sum(0) + matrix.sum(1) - hit)


RECORDS = {"labels": LabelRecord, "masks": MaskRecord}
