"""Which splits trials and winners see: no trial a test split, the winner what trials were validated on."""

import pytest

import vpeft
from tests.support.sets import few_shot, pictures, vtab
from vpeft.data.sets import registry
from vpeft.data.sets.imagenet import wnids
from vpeft.engine.config import load_config
from vpeft.sweeps import sweep
from vpeft.sweeps.driver import Sweep
from vpeft.sweeps.space import load_space
from vpeft.tasks.registry import get_task

ONE = "sampler: grid\nspace: {optim.lr: [0.01]}\n"
TUNED = ["data.val_size=0", "data.train_split=train800", "data.val_split=val200"]


def test_no_trial_opens_a_test_split(experiment, space, tmp_path, monkeypatch):
    root, chosen = tmp_path / "data", wnids()[:4]
    pairs = [(f"{w}/{i}.JPEG", label) for label, w in enumerate(chosen) for i in range(2)]
    few_shot(root / "imagenet/annotations", root / "imagenet/train", {"train_meta.list.num_shot_2.seed_1": pairs})
    pictures(root / "imagenet/val", [f"{w}/v.JPEG" for w in chosen])
    pictures(root / "imagenet-sketch", [f"{chosen[1]}/s.JPEG"])
    given = [
        "data.source=imagenet", f"data.root={root}", "data.shots=2", "data.list_seed=1", "data.val_size=4",
        "data.also_test=[imagenet-sketch]", "train.batch_size=4", "train.epochs=1",
    ]  # fmt: skip
    real, opened = registry._opened, []

    def seen(found, what, split, transform):
        opened.append((found.name, split))
        return real(found, what, split, transform)

    monkeypatch.setattr(registry, "_opened", seen)
    sweep(experiment, space(ONE), given, seeds=())
    assert set(opened) == {("imagenet", "train")}
    result = sweep(experiment, space(ONE), given, seeds=[0])
    assert {("imagenet", "test"), ("imagenet-sketch", "test")} <= set(opened)
    assert len(result["winner"]["scores"]) == 1


def test_the_winner_learns_from_the_split_that_has_the_validation_samples(experiment, space, tmp_path):
    labels = {"train800": [0, 1] * 4, "val200": [1, 0], "train800val200": [0, 1] * 5, "test": [1, 0, 1]}
    vtab(tmp_path / "vtab", "kitti", labels)
    text = ONE + "final: {data.train_split: train800val200%s}"
    own = ["data.source=vtab/kitti", f"data.root={tmp_path / 'vtab'}", *TUNED, "train.patience=2"]
    for source in (own, ["data.source=offline/digits", *TUNED, "train.patience=2"]):
        final = Sweep(experiment, load_space(space(text % "")), source, [0]).final({}, 0)
        assert (final.data.train_split, final.data.val_split, final.data.val_size) == ("train800val200", None, 0)
        assert (final.data.test_split, final.train.patience) == ("test", None)
        with pytest.raises(vpeft.DataError, match=r"val200.*train800val200|train800val200.*val200"):
            Sweep(experiment, load_space(space(text % ", data.val_split: val200")), source, [0])
    cut = Sweep(experiment, load_space(space(text % ", data.val_size: 100")), source, [0]).final({}, 0)
    assert (cut.data.val_split, cut.data.val_size, cut.train.patience) == (None, 100, 2)
    given = load_space(space(ONE), final=["data.train_split=train800val200", "train.epochs=3"])
    told = Sweep(experiment, given, own, [0]).final({}, 0)
    assert (told.data.train_split, told.data.val_split, told.train.epochs) == ("train800val200", None, 3)
    plain = Sweep(experiment, load_space(space(ONE)), source, [0]).final({}, 0)
    assert (plain.data.train_split, plain.data.val_split) == ("train800", "val200")


@pytest.mark.parametrize(
    ("train", "val", "test", "said"),
    [
        ("train800val200", "val200", "test", "data.val_split: val200 shares images with the train split, train800val200"),
        ("train800", "train800", "test", "data.val_split: train800 shares"),
        ("train800", "val200", "val200", "data.test_split: val200 shares images with the val split"),
        ("train800val200", "null", "train800", "data.test_split: train800 shares"),
        ("train800", "test", "test", "data.test_split: test shares"),
        ("train800", "val20", "test", "offline/digits: no split 'val20'; did you mean 'val200'"),
    ],
)
def test_splits_of_offline_tasks_that_share_images_are_refused(experiment, train, val, test, said):
    given = ["data.source=offline/digits", "data.val_size=0", f"data.train_split={train}", f"data.val_split={val}"]
    config = load_config(experiment, [*given, f"data.test_split={test}"])
    with pytest.raises(vpeft.DataError, match=said):
        get_task(config).check()
    get_task(load_config(experiment, [*given[:2], "data.train_split=train800", "data.val_split=val200"])).check()
    get_task(load_config(experiment, [*given[:2], "data.train_split=train800val200"])).check()
