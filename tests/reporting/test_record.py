"""What is kept of a pass over a test split, against torchmetrics and against counting by hand."""

import csv
import io

import numpy as np
import pytest
import torch
from accelerate import PartialState
from torch.utils.data import Dataset, IterableDataset
from torchmetrics.classification import MulticlassCalibrationError, MulticlassConfusionMatrix

from vpeft.data.broken import Tally
from vpeft.data.loader import make_loader
from vpeft.engine.outputs import CSVLines
from vpeft.errors import DataError
from vpeft.reporting.calibration import Reliability
from vpeft.reporting.record import LabelRecord, MaskRecord
from vpeft.reporting.tables import per_class, read_csv, write_confusion, write_csv, write_predictions
from vpeft.tasks.labels import LabelStep
from vpeft.tasks.segmentation.step import SegmentationStep

PLAIN = {"mean": [0.0] * 3, "std": [1.0] * 3}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_process():
    PartialState()


class Scored(Dataset):
    """Samples whose "image" holds the scores that the model gives it."""

    def __init__(self, scores: torch.Tensor, labels: torch.Tensor, broken: tuple[int, ...] = ()):
        self.scores, self.labels, self.unreadable, self.broken = scores, labels, broken, Tally()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        if index in self.unreadable:
            raise DataError(f"sample {index} is broken")
        image = torch.zeros(3, 4, 40)
        image[0, 0, : self.scores.shape[1]] = self.scores[index]
        return image, int(self.labels[index])


def told(dataset: Scored, classes: int, batch: int = 7) -> LabelRecord:
    record = LabelRecord(make_loader(dataset, batch, train=False), [f"c{i}" for i in range(classes)], PLAIN)
    LabelStep(classes).evaluate(lambda x: x[:, 0, 0, :classes], record, CPU, record=record)
    record.gather()
    return record


def some_scores(count: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    labels = torch.randint(0, classes, (count,))
    return torch.randn(count, classes) + 2 * torch.nn.functional.one_hot(labels, classes), labels


def test_the_error_is_torchmetrics_own():
    """Tolerance: 1e-4 percent, as torchmetrics adds up in float32."""
    scores, labels = some_scores(500, 6)
    shares, found = scores.softmax(1), Reliability()
    for part in range(0, 500, 100):
        rows = slice(part, part + 100)
        found.add(shares[rows].amax(1), shares[rows].argmax(1) == labels[rows])
    metric = MulticlassCalibrationError(6, n_bins=15, norm="l1")
    assert found.error() == pytest.approx(100 * float(metric(shares, labels)), abs=1e-4)
    assert found.counts[0].sum() == 500
    assert Reliability().error() is None
    sure = Reliability()
    sure.add(torch.tensor([1.0, 0.95, float("nan")]), torch.tensor([True, False, True]))
    assert sure.counts[:, -1].tolist() == pytest.approx([2, 1.95, 1]), (
        "the confidence 1 is in the last bin; torchmetrics gives it its own"
    )
    assert sure.error() == pytest.approx(100 * 0.95 / 2)


def test_each_row_is_of_the_sample_whose_number_it_has():
    scores, labels = some_scores(40, 5)
    dataset = Scored(scores, labels, broken=(0, 9, 39))
    record = told(dataset, 5)
    kept = [i for i in range(40) if i not in (0, 9, 39)]
    assert record.columns["index"].tolist() == kept
    assert record.columns["true"].tolist() == labels[kept].tolist()
    assert record.columns["predicted"].tolist() == scores[kept].argmax(1).tolist()
    assert np.allclose(record.columns["shares"], scores[kept].softmax(1), atol=1e-6)


def test_a_stream_numbers_its_samples_as_they_come(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from ((torch.full((3, 2, 2), float(i % 3)), i % 3) for i in range(7))

    record = LabelRecord(make_loader(Stream(), 3, train=False), ["a", "b", "c"], PLAIN)
    LabelStep(3).evaluate(lambda x: -(x[:, 0, 0, :1] - torch.arange(3.0)).abs(), record, CPU, record=record)
    record.gather()
    write_predictions(tmp_path / "p.csv", record)
    assert [row[:4] for row in read_csv(tmp_path / "p.csv")[1:]] == [
        [str(i), f"sample {i}", *["abc"[i % 3]] * 2] for i in range(7)
    ]


def test_equal_scores_are_judged_as_in_the_metrics():
    scores = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]]).repeat(4, 1)
    assert told(Scored(scores, torch.zeros(8).long()), 3).columns["predicted"].tolist() == scores.argmax(1).tolist()


def test_the_worst_are_the_most_confident_mistakes():
    scores, labels = some_scores(200, 4)
    record = told(Scored(scores, labels), 4)
    confidence, found = scores.softmax(1).max(1)
    wrong = (found != labels).nonzero().flatten()
    order = wrong[confidence[wrong].argsort(descending=True)][:24]
    assert [index for _, index, _ in record.worst] == order.tolist()
    assert all(pair == [labels[i], found[i]] for _, i, (pair, _) in record.worst)


def test_predictions_of_few_and_of_many_classes(tmp_path):
    scores, labels = some_scores(30, 5)
    write_predictions(tmp_path / "few.csv", told(Scored(scores, labels), 5))
    heading, *rows = read_csv(tmp_path / "few.csv")
    assert heading == ["index", "file", "true", "predicted", "probability", *(f"p(c{i})" for i in range(5))]
    assert [float(x) for x in rows[3][5:]] == pytest.approx(scores[3].softmax(0).tolist(), abs=1e-6)
    scores, labels = some_scores(30, 30)
    write_predictions(tmp_path / "many.csv", told(Scored(scores, labels), 30))
    heading, *rows = read_csv(tmp_path / "many.csv")
    assert heading[5:7] == ["class_1", "probability_1"]
    assert heading[-1] == "probability_5"
    best = scores[7].softmax(0).topk(5)
    assert rows[7][5::2] == [f"c{i}" for i in best.indices.tolist()]
    assert [float(x) for x in rows[7][6::2]] == pytest.approx(best.values.tolist(), abs=1e-6)


def test_each_class_by_itself(tmp_path):
    scores = torch.eye(4)[torch.tensor([0, 0, 1, 1, 1, 2])]
    record = told(Scored(scores, torch.tensor([0, 0, 0, 1, 1, 0])), 4)
    assert per_class(record)[1] == [
        ("c0", 4, 50.0, 100.0),
        ("c1", 2, 100.0, 66.6667),
        ("c2", 0, None, 0.0),
        ("c3", 0, None, None),
    ]
    write_confusion(tmp_path / "c.csv", record)
    assert [row[1:] for row in read_csv(tmp_path / "c.csv")[1:]] == [list("2110"), list("0200"), list("0000"), list("0000")]
    record.classes = [f"c{i}" for i in range(1001)]
    for key in ("true", "predicted"):
        record.columns[key] = record.columns[key] + 997
    write_confusion(tmp_path / "c.csv", record)
    assert read_csv(tmp_path / "c.csv")[1:] == [
        ["c997", "c997", "2"],
        ["c997", "c998", "1"],
        ["c997", "c999", "1"],
        ["c998", "c998", "2"],
    ]


class Pixels(Dataset):
    """Masks of two sizes, and images that hold what the model finds in them."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int):
        torch.manual_seed(index)
        shape = (8, 8 + 4 * (index % 2))
        mask = torch.randint(0, 3, shape)
        mask[0] = 255
        return torch.rand(3, *shape), mask

    def collate(self, items):
        images, masks = zip(*items, strict=True)
        return list(images), list(masks)


class Finds:
    def semantic(self, images):
        return images


def test_masks_of_several_sizes():
    step, dataset = SegmentationStep(3, crop=8, stride=8), Pixels()
    record = MaskRecord(make_loader(dataset, 3, train=False), ["a", "b", "c"], PLAIN)
    values = step.evaluate(Finds(), record, CPU, record=record)
    record.gather()
    matrix, accuracies, confidences, right = MulticlassConfusionMatrix(3, ignore_index=255), [], [], []
    for image, mask in (dataset[i] for i in range(5)):
        scores = step.scores(Finds(), image[None], mask.shape)[0]
        matrix.update(scores.argmax(0), mask)
        seen = mask != 255
        right.append((scores.argmax(0) == mask)[seen])
        accuracies.append(100 * float(right[-1].float().mean()))
        confidences.append(scores.softmax(0).amax(0)[seen])
    assert record.matrix.tolist() == matrix.compute().tolist()
    assert record.columns["index"].tolist() == [0, 1, 2, 3, 4]
    assert record.columns["accuracy"].tolist() == pytest.approx(accuracies, abs=1e-4)
    assert np.nanmean([row[2] for row in per_class(record)[1]]) == pytest.approx(values["miou"], abs=1e-3)
    expected = Reliability()
    expected.add(torch.cat(confidences), torch.cat(right))
    assert record.numbers()["ece"] == pytest.approx(expected.error(), abs=1e-3)
    assert sorted(index for _, index, _ in record.worst) == [0, 1, 2, 3, 4]
    assert [badness for badness, *_ in record.worst] == sorted((-record.columns["miou"]).tolist(), reverse=True)


@pytest.mark.parametrize("name", ["a\rb", "a\r\nb", 'a"b', "a,b", "=1+1", "\u2028", " a ", ""])
def test_any_name_comes_back_from_a_table(tmp_path, name):
    rows = [["index", "file", name], ["0", name, "x"], ["1", "y", name]]
    write_csv(tmp_path / "a.csv", rows)
    assert read_csv(tmp_path / "a.csv") == rows
    line = CSVLines([name])
    assert list(csv.reader(io.StringIO(line({"file": name, "shares": {name: 1.0}}), newline="")))[1] == [name, "1.0"]
