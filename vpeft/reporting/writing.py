"""All files that a record leaves in a folder."""

from pathlib import Path

from .pictures import draw_confusion, draw_reliability, draw_tiles, plain
from .record import MaskRecord, Record
from .tables import per_class, write_confusion, write_csv, write_predictions

PREDICTIONS, CONFUSION, PER_CLASS = "predictions.csv", "confusion.csv", "per_class.csv"
CONFUSION_PICTURE, RELIABILITY, WORST = "confusion.png", "reliability.png", "worst.png"
PAGE = "report.html"
FILES = (PREDICTIONS, CONFUSION, PER_CLASS, CONFUSION_PICTURE, RELIABILITY, WORST, PAGE)


def write_record(folder: Path, record: Record) -> None:
    """Tables and pictures of a record that was gathered; a picture that would show nothing is left out, and removed."""
    for name in (CONFUSION_PICTURE, RELIABILITY, WORST):
        (folder / name).unlink(missing_ok=True)
    if not record.columns:
        return
    masks = isinstance(record, MaskRecord)
    unit = "pixels" if masks else "samples"
    write_predictions(folder / PREDICTIONS, record)
    write_confusion(folder / CONFUSION, record)
    heading, rows = per_class(record)
    write_csv(folder / PER_CLASS, [heading, *rows])
    if len(record.confusion()[0]):
        draw_confusion(folder / CONFUSION_PICTURE, record.confusion(), record.classes, unit)
    if record.reliability.error() is not None:
        draw_reliability(folder / RELIABILITY, record.reliability, unit)
    if record.worst:
        (_worst_masks if masks else _worst_labels)(folder / WORST, record)


def _worst_labels(path: Path, record: Record) -> None:
    tiles = [
        (picture, plain(f"true: {record.classes[true]}", 60), f"{confidence:.1%} {plain(record.classes[found], 60)}")
        for confidence, _, ((true, found), picture) in record.worst
    ]
    draw_tiles(path, tiles, 6, "most confidently wrong: true class; probability and name of the predicted one")


def _worst_masks(path: Path, record: Record) -> None:
    tiles = [
        (picture, plain(Path(record.name(index)).name, 40), f"mIoU {-badness:.1f} %")
        for badness, index, picture in record.worst
    ]
    draw_tiles(path, tiles, 2, "lowest mIoU: image, true classes, found classes")
