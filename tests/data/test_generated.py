"""Drawn images: dSprites' rules, and the tasks that a backbone is pretrained on."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import label as label_components

from vpeft.data.generated import dsprites
from vpeft.data.generated.offline import GROUPS, scenes_count, scenes_distance, sprite_indices
from vpeft.data.generated.offline import TASKS as TASKS_OFFLINE
from vpeft.data.generated.pretext import CLASSES, TASKS, Pretext
from vpeft.data.sources import BUILT_IN
from vpeft.engine.config import load_config
from vpeft.errors import ConfigError, DataError
from vpeft.tasks.labels import LabelStep
from vpeft.tasks.registry import get_task


def test_dsprites_are_numbered_as_in_the_official_file():
    assert dsprites.latents(0) == (0, 0, 0, 0, 0)
    assert dsprites.latents(dsprites.LENGTH - 1) == (2, 5, 39, 31, 31)
    for index in (16399, 634903, 352707):
        assert dsprites.index_of(*dsprites.latents(index)) == index
    with pytest.raises(IndexError):
        dsprites.latents(dsprites.LENGTH)


def test_a_square_is_where_it_should_be():
    picture = dsprites.render(0, 0, 0, 0, 31)  # half size, upright: |offset| < 4.799 about (16, 48)
    rows, columns = np.nonzero(picture)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (11, 20, 43, 52)
    assert set(np.unique(picture)) == {0, 255}
    assert picture.sum() == 255 * 100


def test_shapes_turn_counter_clockwise_and_end_where_they_began():
    heart = [dsprites.render(2, 5, turn, 16, 16) for turn in (0, 39)]
    assert (heart[0] == heart[1]).all()
    wide = np.nonzero(dsprites.render(1, 5, 0, 16, 16))
    tall = np.nonzero(dsprites.render(1, 5, 10, 16, 16))  # a quarter, nearly
    assert np.ptp(wide[1]) > np.ptp(wide[0])
    assert np.ptp(tall[0]) > np.ptp(tall[1])
    rows, columns = np.nonzero(dsprites.render(1, 5, 5, 16, 16))  # an eighth: the right end is up
    assert np.corrcoef(rows, columns)[0, 1] < -0.3


def test_areas_of_ellipse_and_heart_are_those_of_their_outlines():
    for shape, area in ((1, np.pi * 12.782 * 7.220), (2, 9.6231 * 0.6628 * 180 * np.pi / 16)):
        assert (dsprites.render(shape, 5, 0, 16, 16) > 0).sum() == pytest.approx(area, rel=0.03)


def test_labels_of_the_derived_tasks():
    assert [dsprites.location_label(dsprites.index_of(0, 0, 0, x, 5)) for x in (0, 1, 2, 31)] == [0, 0, 1, 15]
    found = [dsprites.orientation_label(dsprites.index_of(1, 2, o, 3, 4)) for o in range(40)]
    assert [found.count(k) for k in range(16)] == [3, 2] * 8


@pytest.fixture(scope="module")
def pictures():
    return Pretext(None, "train")


def test_a_picture_depends_on_its_index_alone(pictures):
    again = Pretext(None, "train")
    for index in (15, 3, 159_999):
        picture, label = pictures.draw(index)
        assert picture.shape == (28, 28)
        assert picture.dtype == np.uint8
        assert (again.draw(index)[0] == picture).all()
        assert again.draw(index)[1] == label
    assert not (Pretext(None, "test").draw(3)[0] == pictures.draw(3)[0]).all()


def test_every_class_is_drawn_and_tasks_keep_their_shares(pictures):
    names = [CLASSES[pictures.draw(i)[1]] for i in range(3200)]
    assert len(set(names)) == len(CLASSES) == len(set(CLASSES))
    drawn = [name.partition("/")[0] for name in names]
    shares = sum(share for *_, share in TASKS.values())
    assert {task: drawn.count(task) for task in TASKS} == {t: 3200 * s // shares for t, (_, _, s) in TASKS.items()}


def test_a_sample_is_judged_among_the_classes_of_its_task():
    step = LabelStep(5)
    step.groups = (0, 0, 1, 1, 1)
    scores, labels = torch.randn(4, 5, dtype=torch.float64), torch.tensor([1, 4, 0, 2])
    expected = torch.stack(
        [F.cross_entropy(s[:2] if y < 2 else s[2:], y if y < 2 else y - 2) for s, y in zip(scores, labels, strict=True)]
    )
    assert torch.allclose(step.loss(scores, labels), expected.mean(), atol=1e-12)
    scores = torch.tensor([[9.0, 0, 0, 1, 0]])  # best of all: another task's class
    found = step.evaluate(torch.nn.Identity(), [(scores, torch.tensor([3]))], torch.device("cpu"))
    assert found["top1"] == 100
    assert found["loss"] == pytest.approx(float(F.cross_entropy(scores[:, 2:], torch.tensor([1]))))


def test_classes_of_several_tasks_share_no_label():
    config = load_config("configs/pretrain/vit_micro_pretext.yaml", ["data.fashion_mnist=null"])
    task = get_task(config)
    task.check()
    data, _ = task.open_data()
    assert [len({g for g, n in zip(task.groups, data.classes, strict=True) if n.startswith(f"{t}/")}) for t in TASKS] == [
        1
    ] * 10
    assert len(set(task.groups)) == 10
    with pytest.raises(ConfigError, match="holds several tasks"):
        get_task(load_config("configs/pretrain/vit_micro_pretext.yaml", ["train.label_smoothing=0.1"])).check()


# ---- the offline benchmark ----


def test_the_sprites_are_those_of_vtab():
    train, test = sprite_indices("train"), sprite_indices("test")
    assert train[:5] == (16399, 634903, 206287, 470425, 352707)
    assert (train[799], train[800:803], test[:3]) == (86528, (220697, 85843, 84902), (493443, 195884, 225768))
    assert len(train) == len(test) == 1000
    places = np.bincount([dsprites.location_label(i) for i in train[:800]])
    assert places.tolist() == [54, 42, 45, 45, 48, 54, 49, 48, 62, 51, 50, 60, 50, 47, 53, 42]
    turns = np.bincount([dsprites.orientation_label(i) for i in train[:800]])
    assert turns.tolist() == [59, 43, 67, 50, 53, 45, 58, 43, 61, 38, 52, 42, 56, 35, 57, 41]


@pytest.mark.parametrize("name", ["digits", "corruptions", "scenes_distance", "dsprites_scale"])
def test_offline_tasks_have_the_splits_of_vtab(name):
    opened, classes = BUILT_IN[f"offline/{name}"]
    whole, train, val, test = (opened(None, split) for split in ("train800val200", "train800", "val200", "test"))
    assert (len(whole), len(train), len(val)) == (1000, 800, 200)
    assert (np.concatenate([train.images, val.images]) == whole.images).all()
    assert set(whole.labels) == set(test.labels) == set(range(len(classes)))
    seen = {picture.tobytes() for picture in whole.images}
    assert sum(picture.tobytes() in seen for picture in test.images) < 20  # a few sprites are alike
    with pytest.raises(DataError, match="did you mean 'val200'"):
        opened(None, "val20")


def test_offline_tasks_are_of_three_groups():
    assert {task.group for task in TASKS_OFFLINE.values()} == set(GROUPS)
    assert len(TASKS_OFFLINE) >= 10


def test_distances_and_counts_are_what_the_label_says():
    """Told from the picture alone: garments stand out from the ground."""
    garments = np.full((5, 28, 28), 255, np.uint8), np.zeros(5, int)
    for i in range(6):
        picture, label = scenes_count(np.random.default_rng(i), garments)
        assert label_components(picture > 150)[1] == label + 1
        picture, label = scenes_distance(np.random.default_rng(i), garments)
        found, count = label_components(picture > 150)
        if count == 2:
            middles = [np.argwhere(found == k).mean(0) for k in (1, 2)]
            assert (2 * np.hypot(*(middles[0] - middles[1])) - 13) / 5 == pytest.approx(label + 0.5, abs=0.9)
