"""Readers of other libraries give the same pixels and the same labels as folders do."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import IterableDataset

import vpeft
from tests.support.own_data import class_folders
from vpeft.data.broken import leave_out
from vpeft.data.find import find_images
from vpeft.data.loader import make_loader
from vpeft.data.splits import Datasets
from vpeft.engine.config import AugmentConfig, DataConfig
from vpeft.tasks.classification.data import ReaderImages, Shown, build_datasets
from vpeft.tasks.classification.folder import FolderImages

STATS = {
    "input_size": (3, 16, 16), "mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "nearest", "crop_pct": 1.0,
    "crop_mode": "center",
}  # fmt: skip


def opened(root: Path, **data):
    data = OmegaConf.structured(DataConfig(root=str(root), **data))
    return build_datasets(data, OmegaConf.structured(AugmentConfig()), STATS)


@pytest.fixture
def folders(tmp_path):
    root = class_folders(tmp_path, {"train/a": 2, "train/b": 2, "train/c": 2, "test/b": 1, "test/c": 1})
    deep = np.full((16, 16), 65535, np.uint16)
    deep[:, :8] = 0
    Image.fromarray(deep).save(root / "test/c/9.png")
    return root


def test_torchvisions_folders_have_the_training_splits_labels_and_the_same_pixels(folders):
    own, other = (opened(folders, source=source) for source in ("folder", "torch/image_folder"))
    assert own.classes == other.classes == ("a", "b", "c")
    for split in ("train", "test"):
        a, b = getattr(own, split), getattr(other, split)
        assert [label for _, label in a] == [label for _, label in b]
        assert all(torch.equal(x, y) for (x, _), (y, _) in zip(a, b, strict=True))
    assert [label for _, label in own.test] == [1, 2, 2]
    assert own.test[2][0].unique().tolist() == [0, 1]
    class_folders(folders, {"test/d": 1})
    with pytest.raises(vpeft.DataError, match="'test' has the class d"):
        opened(folders, source="torch/image_folder")


def test_a_cut_of_torchvisions_set_leaves_the_training_transform_alone(folders):
    data = OmegaConf.structured(DataConfig(source="torch/image_folder", root=str(folders), val_size=2))
    found = build_datasets(data, OmegaConf.structured(AugmentConfig(enabled=True)), STATS)
    train, held = found.train.dataset, found.val.dataset
    assert (len(found.train), len(found.val)) == (4, 2)
    assert train.transform is not held.transform
    plain = opened(folders, source="torch/image_folder").train
    assert torch.equal(held[0][0], plain[0][0]), "seen as in a test"


class Reader:
    """As timm's are: opened files and labels."""

    def __init__(self, contents):
        self.contents = contents

    def __len__(self):
        return len(self.contents)

    def __getitem__(self, index):
        return io.BytesIO(self.contents[index]), index

    def filename(self, index):
        return None if index else "first.png"


def test_a_broken_sample_of_a_reader_is_named_and_not_replaced():
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), 65535, np.uint16)).save(file, "PNG")
    found = ReaderImages(Reader([b"no image", file.getvalue()]), np.asarray)
    with pytest.raises(vpeft.DataError, match=r"^first\.png is not a readable image"):
        found[0]
    assert found[1][0].tolist() == [[[255] * 3] * 4] * 4
    assert found.sample_name(1) == "sample 1 of the data set"
    found.target_transform = [5, 6].__getitem__
    assert found[1][1] == 6


def test_images_of_any_mode_are_brought_to_rgb_before_the_transform():
    shown = Shown(np.asarray)
    assert shown(Image.fromarray(np.full((2, 2), 65535, np.uint16))).tolist() == [[[255] * 3] * 2] * 2
    with pytest.raises(vpeft.DataError, match="floating-point"):
        shown(Image.new("F", (2, 2)))


def test_samples_of_a_stream_cannot_be_counted():
    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.zeros(1), 0

    with pytest.raises(vpeft.DataError, match=r"data\.skip_broken: samples of a stream"):
        leave_out(Datasets(Stream(), None, None, ("a",)))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_what_can_be_read(folders, workers):
    for i in (0, 1):
        (folders / f"train/a/{i}.png").write_bytes(b"")
    (folders / "train/b/1.png").write_bytes(b"")
    data = Datasets(FolderImages(folders / "train", lambda image: torch.zeros(1)), None, None, ("a", "b", "c"))
    strict = make_loader(data.train, 2, train=False, workers=workers)
    with pytest.raises(vpeft.DataError, match=r"train/a/0\.png is not a readable image: [^\n]*; .*skip_broken=true$"):
        list(strict)
    leave_out(data)
    loader = make_loader(data.train, 2, train=False, workers=workers)
    for _ in range(2):
        assert [labels.tolist() for _, labels in loader] == [[1], [2, 2]]
    assert len(data.train.broken.reasons) == 3, "each once"
    # In training of several processes none may stay behind.
    shared = make_loader(data.train, 2, train=True, workers=workers, world=2)
    with pytest.raises(vpeft.DataError, match="a process has no sample left of its part of a batch"):
        list(shared)


def test_images_are_found_behind_links_and_once(folders, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "more").symlink_to(folders / "test")
    (photos / "again").symlink_to(photos)
    (photos / ".hidden").mkdir()
    for name in (".hidden/a.png", "._b.png"):
        (photos / name).write_bytes(b"")
    (photos / "folder.png").mkdir()
    found = find_images([photos])
    assert [p.relative_to(photos).as_posix() for p in found] == ["more/b/0.png", "more/c/0.png", "more/c/9.png"]
