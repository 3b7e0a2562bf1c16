"""The order of TensorFlow Datasets, rebuilt: published read-outs, and the ranks that VTAB-1k takes."""

import hashlib

import numpy as np
import pytest

from vpeft.data.generated import dsprites
from vpeft.data.sets.order import SLICES, ranked

EUROSAT = {
    "AnnualCrop": 3000, "Forest": 3000, "HerbaceousVegetation": 3000, "Highway": 2500, "Industrial": 2500, "Pasture": 2000,
    "PermanentCrop": 2500, "Residential": 3000, "River": 2500, "SeaLake": 3000,
}  # fmt: skip


def picked(dataset: str, name: str, keys: list) -> list:
    """The keys of a list, in its order; ``keys`` are those of its split."""
    one, totals = getattr(SLICES[dataset], name), SLICES[dataset].totals
    assert len(keys) == totals[one.split]
    return [keys[i] for i in ranked(one.split, keys)[one.start : one.stop]]


def test_cifar_as_published_read_outs_show_it():
    train = picked("cifar", "train800", list(range(50_000)))
    assert (train[:6], train[799], len(train)) == ([16399, 1680, 47917, 17307, 27051, 48736], 45288, 800)
    assert picked("cifar", "val200", list(range(50_000)))[:5] == [13431, 9237, 17462, 32685, 9518]
    test = picked("cifar", "test", list(range(10_000)))
    assert (test[:3], len(test)) == ([9933, 5669, 163], 10_000)


def test_svhn():
    keys = list(range(73_257))
    assert picked("svhn", "train800", keys)[:5] == [16399, 1680, 47917, 17307, 27051]
    found = picked("svhn", "val200", keys)
    assert (found[:5], len(found)) == ([21145, 64736, 23870, 1919, 26393], 200)


def test_smallnorb_validates_on_its_test_split():
    keys = list(range(24_300))
    assert picked("smallnorb", "train800", keys)[:5] == [16399, 1680, 17307, 1456, 19135]
    assert picked("smallnorb", "val200", keys)[:5] == [23018, 16932, 19084, 9933, 24157]
    test = picked("smallnorb", "test", keys)
    assert (test[:5], len(test)) == ([299, 2838, 15595, 9948, 17287], 12_150)


@pytest.mark.slow
def test_dsprites():
    keys = list(range(737_280))
    train, test = picked("dsprites", "train800", keys), picked("dsprites", "test", keys)
    assert (train[:5], train[-1]) == ([16399, 634903, 206287, 470425, 352707], 86528)
    assert picked("dsprites", "val200", keys)[:5] == [220697, 85843, 84902, 106270, 175044]
    assert (test[:5], test[-1], len(test)) == ([493443, 195884, 225768, 246626, 645967], 522357, 73_728)
    counts = {
        dsprites.location_label: [54, 42, 45, 45, 48, 54, 49, 48, 62, 51, 50, 60, 50, 47, 53, 42],
        dsprites.orientation_label: [59, 43, 67, 50, 53, 45, 58, 43, 61, 38, 52, 42, 56, 35, 57, 41],
        lambda i: dsprites.latents(i)[0]: [262, 273, 265],
    }
    for label, expected in counts.items():
        assert np.bincount([label(i) for i in train]).tolist() == expected


def test_clevr_is_salted_with_the_word_validation():
    train = [f"CLEVR_train_{i:06d}.png" for i in range(70_000)]
    assert [k[12:18] for k in picked("clevr", "train800", train)[:3]] == ["043876", "033421", "062025"]
    assert [k[12:18] for k in picked("clevr", "val200", train)[:3]] == ["035084", "029360", "004525"]
    test = picked("clevr", "test", [f"CLEVR_val_{i:06d}.png" for i in range(15_000)])
    assert [k[10:16] for k in test[:3]] == ["011736", "005989", "008130"]


def test_patch_camelyon():
    assert picked("patch_camelyon", "val200", [f"valid_{i}" for i in range(32_768)])[:3] == [
        "valid_3270", "valid_10310", "valid_20603",
    ]  # fmt: skip
    assert picked("patch_camelyon", "test", [f"test_{i}" for i in range(32_768)])[:3] == [
        "test_11072", "test_27274", "test_8313",
    ]  # fmt: skip


def test_patch_camelyon_training():
    train = picked("patch_camelyon", "train800", [f"train_{i}" for i in range(262_144)])
    assert train[:3] == ["train_251464", "train_132287", "train_133786"]


def test_eurosat():
    keys = [f"{name}_{name}_{i}.jpg" for name, count in EUROSAT.items() for i in range(1, count + 1)]
    for name, expected, count in (
        ("train800", ["Forest_687", "Residential_188", "HerbaceousVegetation_1056"], 800),
        ("val200", ["SeaLake_804", "Forest_1554", "River_2237"], 200),
        ("test", ["Pasture_1875", "Residential_150", "AnnualCrop_1282"], 5_400),
    ):
        found = picked("eurosat", name, keys)
        assert [k.partition("_")[2].removesuffix(".jpg") for k in found[:3]] == expected
        assert len(found) == count


def test_sun397_first_images_have_the_least_sums():
    """Its lists are not here: the first of N sums of 128 bits is about the N-th part of all."""
    first = {
        "train": (76_128, ["/r/rope_bridge/sun_biqflnsoednmhvce.jpg", "/t/tower/sun_avxiyhlcnzjayhrk.jpg"]),
        "validation": (10_875, ["/b/boathouse/sun_armmkazxnlvxglwr.jpg"]),
        "test": (21_750, ["/l/living_room/sun_apdtcxrsfiravnis.jpg"]),
    }
    for split, (count, keys) in first.items():
        assert SLICES["sun397"].totals[split] == count
        sums = [int(hashlib.md5(f"{split}{key}".encode()).hexdigest(), 16) / 2**128 for key in keys]
        assert sums == sorted(sums)
        assert sums[-1] < 6 / count
        assert ranked(split, keys[::-1]) == list(range(len(keys)))[::-1]
