"""The data that ship with the package: an excerpt of Fashion-MNIST, the same on every machine."""

import gzip

import numpy as np
import pytest

import vpeft
from vpeft.data.embedded import EXCERPT, FASHION_ROOT, fashion_digest, fashion_mnist
from vpeft.engine.config import from_container
from vpeft.tasks.segmentation.scenes import Scenes


def test_the_excerpt_is_balanced_and_small():
    for split, each in (("train", 320), ("test", 100)):
        found = fashion_mnist(str(EXCERPT), split)
        assert found.images.shape == (10 * each, 28, 28)
        assert np.bincount(found.labels).tolist() == [each] * 10
        assert len(np.unique(found.images.reshape(len(found), -1), axis=0)) > 9.9 * each
    assert sum(f.stat().st_size for f in EXCERPT.iterdir()) <= 2_000_000
    assert "Zalando" in (EXCERPT / "LICENSE").read_text()


def test_generated_scenes_take_the_excerpt_on_every_machine():
    image, mask = Scenes("test", 3)[2]
    again = Scenes("test", 3, root=str(EXCERPT))[2]
    assert (image == again[0]).all()
    assert (mask == again[1]).all()


def test_a_digest_tells_garments_apart(tmp_path):
    for file in EXCERPT.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert fashion_digest(str(tmp_path)) == fashion_digest(None) != fashion_digest(FASHION_ROOT)
    images = tmp_path / "train-images-idx3-ubyte.gz"
    values = bytearray(gzip.decompress(images.read_bytes()))
    values[-1] ^= 255
    images.write_bytes(gzip.compress(bytes(values)))
    fashion_digest.cache_clear()
    assert fashion_digest(str(tmp_path)) != fashion_digest(None)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
def test_damaged_and_foreign_files_are_refused(tmp_path, name):
    for file in EXCERPT.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = (EXCERPT / name).read_bytes()
    split = "train" if name.startswith("train") else "test"
    for damaged in (whole[: len(whole) // 2], b"no gzip", gzip.compress(gzip.decompress(whole)[:-5])):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(vpeft.DataError, match=r"Fashion-MNIST: .*(is damaged|are no images)"):
            fashion_mnist(str(tmp_path), split)
    (tmp_path / name).unlink()
    with pytest.raises(vpeft.DataError, match=f"{name} does not exist; point data.fashion_mnist at"):
        fashion_mnist(str(tmp_path), split)


def test_a_run_of_an_earlier_version_keeps_its_garments():
    """Then the garments of generated sets were the whole set, at its Debian place where no root named another."""
    for data, expected in (
        ({"source": "scenes", "root": None}, FASHION_ROOT),
        ({"source": "scenes", "root": "/garments"}, None),
        ({"source": "motion", "root": "runs/clips"}, FASHION_ROOT),
        ({"source": "motion", "root": "runs/clips", "fashion_mnist": None}, None),
        ({"source": "digits", "root": None}, None),
    ):
        assert from_container({"data": data}).data.fashion_mnist == expected
