"""What counts as a sample of the test split."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset, Subset, TensorDataset

from vpeft.data.embedded import ArrayDataset
from vpeft.errors import ConfigError
from vpeft.search.apart import check_apart, shared
from vpeft.search.config import load_search_config


@pytest.fixture
def folders(tmp_path):
    """Four images in each split."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "both", "test"):
        for name in ("dark", "light"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(2):
                picture = Image.fromarray(rng.integers(0, 255, (16, 16), np.uint8))
                picture.save(tmp_path / "data" / split / name / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture
def config(tiny_file, folders):
    options = [
        "data.source=folder", f"data.root={folders}", "data.train_split=train", "data.val_split=val", "data.val_size=0",
        "data.num_samples=null", "search.retrain_split=both",
    ]  # fmt: skip
    return load_search_config(tiny_file, options)


def test_splits_of_their_own_pass(config):
    check_apart(config)


@pytest.mark.parametrize(
    ("split", "key"), [("train", "data.train_split"), ("val", "data.val_split"), ("both", "search.retrain_on")]
)
@pytest.mark.parametrize("way", ["symbolic", "folder"])
def test_one_file_of_the_test_split_is_found(config, folders, split, key, way):
    if way == "symbolic":
        (folders / split / "dark/9.png").symlink_to(folders / "test/dark/0.png")
    else:
        (folders / split / "light").rename(folders / "away")
        (folders / split / "light").symlink_to(folders / "test/light")
    with pytest.raises(ConfigError, match=rf"^{key}: .*{split}/.*png is in the test split \(test\) too"):
        check_apart(config)


def test_two_names_of_one_data_set_are_found():
    """As torchvision's sets do, whose test split is what timm gives for every name but the training split's."""
    images, labels = np.arange(7 * 64, dtype=np.uint8).reshape(7, 8, 8), np.arange(7)

    class Plain(TensorDataset):
        pass

    one, again = (Plain(torch.tensor(images).float(), torch.tensor(labels)) for _ in range(2))
    other = Plain(torch.tensor(images).float() + 1, torch.tensor(labels))
    assert shared(one, again) == "sample 0"
    assert shared(one, other) == ""
    assert shared(Subset(one, [0, 1, 2]), again) == ""
    assert shared(ArrayDataset(images, labels, np.asarray), ArrayDataset(images, labels, np.asarray)) == "sample 0"
    assert shared(None, one) == ""


def test_streams_are_not_read():
    class Stream(IterableDataset):
        def __iter__(self):
            raise AssertionError("read")

    assert shared(Stream(), Stream()) == ""
