"""VTAB-1k from raw downloads: tiny ones in the true formats, with slices to match; labels of the derived tasks."""

import gzip
import json
import struct
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from tests.support.sets import picture, pictures
from vpeft.data.generated import dsprites
from vpeft.data.sets import Asked, get_set
from vpeft.data.sets.building import RECIPES, build, build_task
from vpeft.data.sets.order import SLICES, RankSlices, Slice, ranked
from vpeft.data.sets.raw import last_below
from vpeft.data.sets.raw_files import CLEVR_DISTANCES, KITTI_DISTANCES, kitti_split, nearest_vehicle
from vpeft.data.sets.retina import prepared, within_pixels
from vpeft.errors import DataError

COLOURS = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)


def small(dataset, totals):
    """RankSlices of a download of a few examples: three, two and the rest."""
    full = SLICES[dataset]
    where = {name: getattr(full, name).split for name in ("train800", "val200", "test")}
    val = Slice(where["val200"], 3, 5) if where["val200"] == where["train800"] else Slice(where["val200"], 0, 2)
    start = 5 if where["test"] == where["train800"] else 2 if where["test"] == where["val200"] else 0
    return RankSlices(Slice(where["train800"], 0, 3), val, Slice(where["test"], start), totals)


def made(task, raw, out, totals, pixels="exact"):
    """What was built of a tiny download: the lists' labels, and the images as arrays."""
    recipe = RECIPES[task]
    build_task(task, recipe, small(recipe.dataset, totals), raw, out, pixels)
    found = get_set(f"vtab/{task}")
    lists = {name: found.read(Asked(out), name) for name in ("train800", "val200", "train800val200", "test")}
    images = {name: [np.asarray(Image.open(p)) for p in one.files] for name, one in lists.items()}
    assert lists["train800val200"].labels == lists["train800"].labels + lists["val200"].labels
    for a, b in zip(images["train800val200"], images["train800"] + images["val200"], strict=True):
        assert np.array_equal(a, b)
    return {name: one.labels for name, one in lists.items()}, images


def in_order(task, split, keys, values, start=0, stop=None):
    return [values[i] for i in ranked(split, keys)[start:stop]]


def cifar(root):
    (root / "cifar-100-binary").mkdir(parents=True)
    for split, count in (("train", 8), ("test", 4)):
        rows = [bytes([i % 20, 10 + i]) + COLOURS[i].transpose(2, 0, 1).tobytes() for i in range(count)]
        (root / "cifar-100-binary" / f"{split}.bin").write_bytes(b"".join(rows))


def test_cifar(tmp_path):
    cifar(tmp_path / "raw")
    labels, images = made("cifar", tmp_path / "raw", tmp_path / "out", {"train": 8, "test": 4})
    assert labels["train800"] == in_order("cifar", "train", range(8), range(10, 18), 0, 3), "fine labels, by rank"
    assert labels["val200"] == in_order("cifar", "train", range(8), range(10, 18), 3, 5)
    assert sorted(labels["test"]) == [10, 11, 12, 13]
    for name, split, start in (("train800", range(8), 0), ("test", range(4), 0)):
        expected = in_order("cifar", name.rstrip("0123456789"), split, COLOURS, start)
        assert all(np.array_equal(a, b) for a, b in zip(images[name], expected, strict=False))


def test_pixels_are_jpeg_of_pils_quality_or_exact_and_the_choice_is_kept(tmp_path):
    cifar(tmp_path / "raw")
    made("cifar", tmp_path / "raw", tmp_path / "png", {"train": 8, "test": 4})
    made("cifar", tmp_path / "raw", tmp_path / "jpg", {"train": 8, "test": 4}, "zip-jpeg")
    notes = [json.loads((tmp_path / kind / "cifar/built.json").read_text())["pixels"] for kind in ("png", "jpg")]
    assert notes == ["exact", "zip-jpeg"]
    Image.fromarray(COLOURS[ranked("test", range(4))[0]]).save(tmp_path / "same.jpg")
    assert (tmp_path / "jpg/cifar/images/test/000000.jpg").read_bytes() == (tmp_path / "same.jpg").read_bytes()
    first = (tmp_path / "jpg/cifar/test.txt").read_text().splitlines()[0]
    assert first == f"images/test/000000.jpg {10 + ranked('test', range(4))[0]}"


def test_svhn(tmp_path):
    for split, labels in (("train", [1, 10, 2, 3, 9, 10]), ("test", [10, 5])):
        values = {"X": COLOURS[: len(labels)].transpose(1, 2, 3, 0), "y": np.array(labels)[:, None]}
        savemat(tmp_path / f"{split}_32x32.mat", values)
    labels, images = made("svhn", tmp_path, tmp_path / "out", {"train": 6, "test": 2})
    assert labels["train800"] == in_order("svhn", "train", range(6), [1, 0, 2, 3, 9, 0], 0, 3)
    assert labels["test"] == in_order("svhn", "test", range(2), [0, 5])
    assert np.array_equal(images["test"][0], COLOURS[ranked("test", range(2))[0]])


def norb(path, values):
    sizes = (*values.shape, *[1] * (3 - values.ndim))
    kind = 0x1E3D4C55 if values.dtype == np.uint8 else 0x1E3D4C54
    path.write_bytes(struct.pack(f"<ii{len(sizes)}i", kind, values.ndim, *sizes) + values.tobytes())


@pytest.mark.parametrize(("task", "column", "divisor"), [("smallnorb_azi", 2, 2), ("smallnorb_ele", 1, 1)])
def test_smallnorb(tmp_path, task, column, divisor):
    pairs = np.random.default_rng(1).integers(0, 256, (6, 2, 96, 96), np.uint8)
    about = np.array([[i, i % 9, 2 * i + 4, 0] for i in range(6)], "<i4")
    for part in ("training", "testing"):
        norb(tmp_path / f"smallnorb-5x01235x9x18x6x2x96x96-{part}-dat.mat", pairs)
        norb(tmp_path / f"smallnorb-5x01235x9x18x6x2x96x96-{part}-info.mat", about)
    labels, images = made(task, tmp_path, tmp_path / "out", {"train": 6, "test": 6})
    expected = (about[:, column] // divisor).tolist()
    assert labels["train800"] == in_order(task, "train", range(6), expected, 0, 3)
    assert labels["val200"] == in_order(task, "test", range(6), expected, 0, 2), "of the test split"
    assert labels["test"] == in_order(task, "test", range(6), expected, 2)
    first = in_order(task, "train", range(6), pairs)[0][0]
    assert all(np.array_equal(images["train800"][0][..., c], first) for c in range(3)), "the left image, grey"


def test_folders_of_classes(tmp_path):
    names = [f"{c}/{c}_{i}.jpg" for c in ("Forest", "AnnualCrop", "River") for i in range(1, 4)]
    pictures(tmp_path / "2750", names)
    labels, _ = made("eurosat", tmp_path, tmp_path / "out", {"train": 9})
    keys = [n.replace("/", "_") for n in names]
    numbers = [["AnnualCrop", "Forest", "River"].index(n.partition("/")[0]) for n in names]
    assert labels["train800"] + labels["val200"] + labels["test"] == in_order("eurosat", "train", keys, numbers)


def test_dtd_flowers_and_pets(tmp_path):
    lists = {
        "train1": ["banded/banded_1.jpg", "dotted/a.jpg", "dotted/b.jpg"],
        "val1": ["banded/v.jpg"] * 2,
        "test1": ["dotted/t.jpg"],
    }
    (tmp_path / "dtd/labels").mkdir(parents=True)
    for name, files in lists.items():
        (tmp_path / "dtd/labels" / f"{name}.txt").write_text("\n".join(files) + "\n")
        pictures(tmp_path / "dtd/images", files)
    labels, _ = made("dtd", tmp_path, tmp_path / "a", {"train": 3, "validation": 2, "test": 1})
    assert labels["train800"] == in_order("dtd", "train", lists["train1"], [0, 1, 1])
    assert (labels["val200"], labels["test"]) == ([0, 0], [1])

    flowers = tmp_path / "flowers"
    flowers.mkdir()
    savemat(flowers / "imagelabels.mat", {"labels": np.array([[77, 5, 102, 1, 9, 8]])})
    savemat(flowers / "setid.mat", {"trnid": np.array([[1, 3, 4]]), "valid": np.array([[5, 6]]), "tstid": np.array([[2]])})
    pictures(flowers / "jpg", [f"image_{i:05d}.jpg" for i in range(1, 7)])
    labels, _ = made("oxford_flowers102", flowers, tmp_path / "b", {"train": 3, "validation": 2, "test": 1})
    keys = ["image_00001.jpg", "image_00003.jpg", "image_00004.jpg"]
    assert labels["train800"] == in_order("flowers", "train", keys, [76, 101, 0])
    assert labels["test"] == [4]

    pets = tmp_path / "pets"
    rows = {"trainval": [(f"Abyssinian_{i}", i + 1) for i in range(6)], "test": [("beagle_1", 37)]}
    for name, found in rows.items():
        pictures(pets / "images", [f"{n}.jpg" for n, _ in found])
        (pets / "annotations").mkdir(exist_ok=True)
        (pets / "annotations" / f"{name}.txt").write_text("".join(f"{n} {c} 1 1\n" for n, c in found))
    labels, _ = made("oxford_iiit_pet", pets, tmp_path / "c", {"train": 6, "test": 1})
    assert labels["train800"] == in_order("pets", "train", [f"{n}.jpg" for n, _ in rows["trainval"]], range(6), 0, 3)
    assert labels["test"] == [36]


def test_clevr_counts_objects_and_takes_the_nearest_ones_depth(tmp_path):
    depths = [[9.2, 8.0, 12.0], [8.2, 9.0, 20.0, 11.0], [10.5] * 10, [8.5000000001] * 3, [9.7] * 3, [7.0] * 5]
    for part in ("train", "val"):
        scenes = [
            {"image_filename": f"CLEVR_{part}_{i:06d}.png", "objects": [{"pixel_coords": [1, 2, d]} for d in row]}
            for i, row in enumerate(depths)
        ]
        (tmp_path / "CLEVR_v1.0/scenes").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"CLEVR_v1.0/scenes/CLEVR_{part}_scenes.json").write_text(json.dumps({"scenes": scenes}))
        pictures(tmp_path / "CLEVR_v1.0/images" / part, [s["image_filename"] for s in scenes])
    keys = [f"CLEVR_val_{i:06d}.png" for i in range(6)]
    for task, expected in (("clevr_count", [0, 1, 7, 0, 0, 2]), ("clevr_dist", [0, 1, 5, 1, 4, 0])):
        labels, _ = made(task, tmp_path, tmp_path / "out", {"train": 6, "validation": 6})
        assert labels["test"] == in_order(task, "validation", keys, expected), task


def test_bins_are_open_below_and_closed_above():
    assert [last_below(CLEVR_DISTANCES, d) for d in (0.1, 8, 8.01, 8.5, 9, 9.01, 9.5, 10, 10.01, 99)] == [
        0, 0, 1, 1, 2, 3, 3, 4, 5, 5,
    ]  # fmt: skip
    assert [last_below(KITTI_DISTANCES, d) for d in (-5, 8, 8.1, 20, 20.1, 900, 1000)] == [0, 0, 1, 1, 2, 2, 3]


def test_kitti(tmp_path):
    row = "{} 0.0 0 0.0 1 2 3 4 1.5 1.6 3.9 -2.0 1.7 {} 0.1"
    assert nearest_vehicle([row.format("Car", 12.0), row.format("Van", 9.5), row.format("Pedestrian", 3.0)]) == 9.5
    assert nearest_vehicle([row.format("Cyclist", 3.0)]) == 1000
    assert nearest_vehicle([]) == 1000
    mapping = [f"2011 video_{i // 3:02d} {i}" for i in range(60)]
    order = [",".join(str(i + 1) for i in range(59, -1, -1))]
    found = kitti_split(order, mapping)
    assert sorted(one for images in found.values() for one in images) == list(range(60))
    assert [len(found[name]) for name in ("train", "validation", "test")] == [48, 6, 6], "two of twenty videos each"
    videos = {name: {mapping[59 - i].split()[1] for i in images} for name, images in found.items()}
    assert not videos["test"] & videos["train"]
    assert not videos["test"] & videos["validation"]
    draw = np.random.RandomState(123)
    assert videos["test"] == set(draw.choice([f"video_{i:02d}" for i in range(20)], 2, replace=False))

    (tmp_path / "mapping").mkdir()
    (tmp_path / "mapping/train_rand.txt").write_text(order[0])
    (tmp_path / "mapping/train_mapping.txt").write_text("\n".join(mapping))
    pictures(tmp_path / "training/image_2", [f"{i:06d}.png" for i in range(60)])
    (tmp_path / "training/label_2").mkdir()
    for i in range(60):
        (tmp_path / "training/label_2" / f"{i:06d}.txt").write_text(row.format("Truck", i) if i % 7 else "")
    labels, _ = made("kitti", tmp_path, tmp_path / "out", {"train": 48, "validation": 6, "test": 6})
    expected = [3 if i % 7 == 0 else 0 if i <= 8 else 1 if i <= 20 else 2 for i in found["test"]]
    assert labels["test"] == in_order("kitti", "test", [f"{i:06d}.png" for i in found["test"]], expected)


def test_sun397_and_retinopathy(tmp_path):
    sun = tmp_path / "sun"
    names = {
        "tr": ["/a/abbey/1.jpg", "/b/balcony/exterior/2.jpg", "/a/abbey/3.jpg"],
        "va": ["/a/abbey/4.jpg"] * 2,
        "te": ["/b/balcony/exterior/5.jpg"],
    }
    for part, found in names.items():
        pictures(sun / "SUN397", [n.lstrip("/") for n in found])
        (sun / f"sun397_tfds_{part}.txt").write_text("\n".join(found))
    (sun / "sun397_labels.txt").write_text("/a/abbey\n/b/balcony/exterior\n")
    labels, _ = made("sun397", sun, tmp_path / "out", {"train": 3, "validation": 2, "test": 1})
    assert labels["train800"] == in_order("sun397", "train", names["tr"], [0, 1, 0])
    assert labels["test"] == [1]
    large = within_pixels(Image.fromarray(np.zeros((600, 800, 3), np.uint8)))
    assert large.size == (400, 300)

    eyes = tmp_path / "eyes"
    pictures(
        eyes, ["train/1_left.jpeg", "train/2_left.jpeg", "train/3_left.jpeg", *(f"test/{i}_left.jpeg" for i in range(4))]
    )
    (eyes / "trainLabels.csv").write_text("image,level\n1_left,0\n2_left,4\n3_left,2\n")
    (eyes / "retinopathy_solution.csv").write_text(
        "image,level,Usage\n0_left,1,Public\n1_left,2,Private\n2_left,3,Public\n3_left,4,Private\n"
    )
    labels, _ = made("diabetic_retinopathy", eyes, tmp_path / "out", {"train": 3, "validation": 2, "test": 2})
    assert labels["train800"] == in_order("eyes", "train", ["1_left", "2_left", "3_left"], [0, 4, 2])
    assert labels["val200"] == in_order("eyes", "validation", ["0_left", "2_left"], [1, 3])
    assert labels["test"] == in_order("eyes", "test", ["1_left", "3_left"], [2, 4])


def test_patch_camelyon_with_a_stand_in_for_h5py(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "h5py", None)
        with pytest.raises(DataError, match=r"read with h5py; pip install h5py"):
            made("patch_camelyon", tmp_path, tmp_path / "out", {"train": 5, "validation": 2, "test": 2})
    monkeypatch.setitem(sys.modules, "h5py", types.SimpleNamespace(File=np.load))
    answers = {"train": [0, 1, 1, 0, 1], "valid": [1, 0], "test": [0, 1]}
    for part, labels in answers.items():
        for kind, values in (("x", COLOURS[: len(labels)]), ("y", np.array(labels)[:, None, None, None])):
            with (tmp_path / f"camelyonpatch_level_2_split_{part}_{kind}.h5").open("wb") as file:
                np.savez(file, **{kind: values})
    found, _ = made("patch_camelyon", tmp_path, tmp_path / "out", {"train": 5, "validation": 2, "test": 2})
    assert found["train800"] == in_order("", "train", [f"train_{i}" for i in range(5)], answers["train"], 0, 3)
    assert found["val200"] == in_order("", "validation", [f"valid_{i}" for i in range(2)], answers["valid"])
    assert found["test"] == in_order("", "test", [f"test_{i}" for i in range(2)], answers["test"])


def test_an_eye_is_brought_to_one_radius_and_cut():
    y, x = np.mgrid[:200, :260]
    eye = (((y - 100) ** 2 + (x - 130) ** 2 < 90**2)[..., None] * np.array([150, 90, 40])).astype(np.uint8)
    found = np.asarray(prepared(Image.fromarray(eye))).astype(int)
    assert found.shape == (540, 540, 3)
    assert np.abs(found[:20, :20] - 128).max() < 8, "grey outside"
    assert np.abs(found[200:340, 200:340] - 128).max() < 8, "an even surface is its own average"
    assert prepared(Image.new("RGB", (30, 20))).size == (540, 540), "a dark one is taken to fill its height"


@pytest.mark.slow
def test_dsprites_is_drawn(tmp_path):
    place = build("vtab/dsprites_loc", None, str(tmp_path), "exact")
    lines = (place / "train800.txt").read_text().splitlines()
    assert (len(lines), lines[0]) == (800, f"images/train800/000000.png {dsprites.location_label(16399)}")
    assert len((place / "test.txt").read_text().splitlines()) == 73_728
    assert np.array_equal(np.asarray(Image.open(place / "images/train800/000000.png"))[..., 0], dsprites.image(16399))


def test_dsprites_labels_and_images(tmp_path):
    recipe = RECIPES["dsprites_ori"]
    slices = replace(
        SLICES["dsprites"], train800=Slice("train", 0, 3), val200=Slice("train", 3, 5), test=Slice("train", 5, 7)
    )
    keys = [16399, 634903, 206287, 470425, 352707, 220697, 85843]

    def some(raw, split):
        whole = recipe.read(raw, split)
        return replace(whole, keys=keys, image=lambda i: whole.image(keys[i]), labels={
            "dsprites_ori": lambda i: whole.labels["dsprites_ori"](keys[i]),
        })  # fmt: skip

    slices = replace(slices, totals={"train": 7})
    build_task("dsprites_ori", replace(recipe, read=some), slices, tmp_path, tmp_path, "exact")
    found = get_set("vtab/dsprites_ori").read(Asked(tmp_path), "train800")
    assert get_set("vtab/dsprites_ori").notes(Asked(tmp_path), found)["data_note"] == "dSprites (re-rendered)"
    chosen = [keys[i] for i in ranked("train", keys)][:3]
    assert chosen == [16399, 634903, 206287]
    assert found.labels == [dsprites.orientation_label(i) for i in chosen]
    assert np.array_equal(np.asarray(Image.open(found.files[0]))[..., 1], dsprites.image(16399))


def test_what_cannot_be_built_is_refused_and_nothing_is_left(tmp_path):
    out = str(tmp_path / "out")
    for name, raw, words in (
        (
            "vtab/caltech101",
            None,
            r"caltech101 cannot be rebuilt .*file system.*; take the lists and images of the shared zip",
        ),
        ("vtab/dmlab", None, "dmlab cannot be rebuilt .*TensorFlow's own format"),
        ("fgvc/cub", None, "only VTAB-1k's tasks are built"),
        ("vtab/svnh", None, "did you mean 'vtab/svhn'"),
        ("vtab/cifar", None, r"--from: no folder is given; cifar is built from .*cifar-100-binary/train\.bin"),
        ("vtab/cifar", str(tmp_path), r"--from: .* holds no cifar-100-binary/train\.bin.*binary version"),
    ):
        with pytest.raises(DataError, match=words):
            build(name, raw, out)
    cifar(tmp_path)
    with pytest.raises(DataError, match=r"holds 8 examples of cifar's split train, not 50000: the order would be another"):
        build("vtab/cifar", str(tmp_path), out)
    with pytest.raises(DataError, match=r"--pixels: 'png' is none of zip-jpeg, exact"):
        build("vtab/cifar", str(tmp_path), out, "png")
    assert not (tmp_path / "out").exists()
    picture(tmp_path / "out/cifar/kept.png")
    with pytest.raises(DataError, match=r"--out: .*cifar is there already"):
        made("cifar", tmp_path, tmp_path / "out", {"train": 8, "test": 4})
    assert (tmp_path / "out/cifar/kept.png").exists()


def test_a_broken_download_leaves_no_folder(tmp_path):
    (tmp_path / "cifar-100-binary").mkdir()
    (tmp_path / "cifar-100-binary/train.bin").write_bytes(b"x" * 3075)
    with pytest.raises(DataError, match="3075 bytes are no records"):
        made("cifar", tmp_path, tmp_path / "out", {"train": 8, "test": 4})
    for part in ("training", "testing"):
        (tmp_path / f"smallnorb-{part}-dat.mat").write_bytes(b"not a matrix of NORB, whatever its name")
        (tmp_path / f"smallnorb-{part}-info.mat").write_bytes(b"")
    with pytest.raises(DataError, match="no file of NORB"):
        made("smallnorb_azi", tmp_path, tmp_path / "out", {"train": 8, "test": 4})
    pictures(tmp_path / "2750", [f"Forest/Forest_{i}.jpg" for i in range(6)])
    (tmp_path / "2750/Forest/Forest_3.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"Forest_3\.jpg is not a readable image"):
        made("eurosat", tmp_path, tmp_path / "out", {"train": 6})
    assert not list((tmp_path / "out").iterdir())


def test_folders_that_programs_leave_are_no_classes(tmp_path):
    names = [f"{c}/{c}_{i}.jpg" for c in ("Forest", "River") for i in range(4)]
    pictures(tmp_path / "2750", names)
    plain, _ = made("eurosat", tmp_path, tmp_path / "plain", {"train": 8})
    for left in (".ipynb_checkpoints", "Empty"):
        (tmp_path / "2750" / left).mkdir()
    picture(tmp_path / "2750/.cache/Forest_9.jpg")
    assert made("eurosat", tmp_path, tmp_path / "out", {"train": 8})[0] == plain

    for part, count in (("train", 3), ("val", 2), ("test", 1)):
        files = [f"banded/{part}_{i}.jpg" for i in range(count)]
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / "labels" / f"{part}1.txt").write_text("\n".join(files))
        pictures(tmp_path / "images", files)
    (tmp_path / "images/.cache").mkdir()
    assert made("dtd", tmp_path, tmp_path / "dtd", {"train": 3, "validation": 2, "test": 1})[0]["train800"] == [0, 0, 0]


@pytest.mark.parametrize(("images", "labels", "words"), [
    (COLOURS[:2], [1, 2, 10], "2 images, but 3 labels"),
    (COLOURS[:3], [1, 2, 11], "labelled 1 to 10, not 1 to 11"),
    (COLOURS[:3], [0, 2, 1], "labelled 1 to 10, not 0 to 2"),
    (COLOURS[:3].transpose(1, 2, 3, 0), [1, 2, 3], "expected images of 3 x 32 x 32 bytes"),
    (COLOURS[:3].astype(float), [1, 2, 3], "got float64"),
])  # fmt: skip
def test_arrays_of_another_form_are_refused(tmp_path, images, labels, words):
    for part in ("train", "test"):
        savemat(tmp_path / f"{part}_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": np.array(labels)[:, None]})
    with pytest.raises(DataError, match=words):
        made("svhn", tmp_path, tmp_path / "out", {"train": 3, "test": 3})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("part", "values", "words"), [
    ("dat", np.zeros((6, 16), np.uint8), r"dat\.mat: expected images of 2 x any x any bytes, got uint8 of \(6, 16\)"),
    ("dat", np.zeros((5, 2, 4, 4), np.uint8), "5 images, but 6 labels"),
    ("info", np.zeros((6,), np.int32), r"info\.mat: expected four numbers for each pair of images"),
])  # fmt: skip
def test_matrices_of_another_form_are_refused(tmp_path, part, values, words):
    for split in ("training", "testing"):
        norb(tmp_path / f"small-{split}-dat.mat", np.zeros((6, 2, 4, 4), np.uint8))
        norb(tmp_path / f"small-{split}-info.mat", np.zeros((6, 4), np.int32))
    norb(tmp_path / f"small-testing-{part}.mat", values)
    with pytest.raises(DataError, match=words):
        made("smallnorb_azi", tmp_path, tmp_path / "out", {"train": 6, "test": 6})
    file = tmp_path / "small-testing-dat.mat"
    file.write_bytes(struct.pack("<6i", 0x1E3D4C55, 4, -3, -2, 4, 4) + bytes(96))
    with pytest.raises(DataError, match="its length is not that of -3 x -2 x 4 x 4 values"):
        made("smallnorb_azi", tmp_path, tmp_path / "out", {"train": 6, "test": 6})
    packed = bytearray(gzip.compress(bytes(range(256)) * 8))
    packed[12:30] = b"\xff" * 18  # inside of what is packed
    file.with_name("small-testing-dat.mat.gz").write_bytes(packed)
    file.unlink()
    with pytest.raises(DataError, match=r"dat\.mat\.gz: not a readable file"):
        made("smallnorb_azi", tmp_path, tmp_path / "out", {"train": 6, "test": 6})


def test_labels_are_looked_at_before_any_image_is_written(tmp_path, capsys):
    """Whatever is wrong with them is one error, and hours of writing are not lost."""
    for depth, task, words in (
        (-1.0, "clevr_dist", "the label of the example CLEVR_val_00000.* cannot be read"),
        (101.0, "clevr_dist", "has the label 6; clevr_dist has 6 classes"),
        ("far", "clevr_dist", "could not convert string to float: 'far'"),
        (9.0, "clevr_count", "has the label -2; clevr_count has 8 classes"),
    ):
        for part in ("train", "val"):
            things = [{"pixel_coords": [1, 2, 9.0 if part == "train" else depth]}] * (3 if part == "train" else 1)
            scenes = [{"image_filename": f"CLEVR_{part}_{i:06d}.png", "objects": things} for i in range(6)]
            (tmp_path / "scenes").mkdir(exist_ok=True)
            (tmp_path / f"scenes/CLEVR_{part}_scenes.json").write_text(json.dumps({"scenes": scenes}))
        with pytest.raises(DataError, match=words):
            made(task, tmp_path, tmp_path / "out", {"train": 6, "validation": 6})
    assert capsys.readouterr().err == "", "no list was begun"
    (tmp_path / "scenes/CLEVR_train_scenes.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="not CLEVR's scenes"):
        made("clevr_dist", tmp_path, tmp_path / "out", {"train": 6, "validation": 6})


def test_a_mapping_of_kitti_that_counts_otherwise_is_refused():
    mapping = [f"2011 video_{i // 3:02d} {i}" for i in range(6)]
    for order in ("0,1,2,3,4,5", "1,2,3,4,5", "1,2,3,4,5,5"):  # the first would take the last line for line 0
        with pytest.raises(ValueError, match="its numbers are not 1 to 6"):
            kitti_split([order], mapping)


@pytest.mark.parametrize("ids", [np.array([["a"]]), np.zeros((0,)), np.array([[1.5]]), np.array([[9]])])
def test_ids_of_flowers_that_are_none_are_refused(tmp_path, ids):
    savemat(tmp_path / "imagelabels.mat", {"labels": np.array([[1, 2, 3]])})
    savemat(tmp_path / "setid.mat", {"trnid": ids, "valid": np.array([[1]]), "tstid": np.array([[2]])})
    with pytest.raises(DataError, match=r"setid\.mat names images that imagelabels\.mat has not"):
        made("oxford_flowers102", tmp_path, tmp_path / "out", {"train": 1, "validation": 1, "test": 1})


def test_where_nothing_can_be_written_and_what_a_killed_build_left(tmp_path, capsys):
    cifar(tmp_path)
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below"):
        with pytest.raises(DataError, match=r"--out: .*file is a file; give a folder"):
            made("cifar", tmp_path, tmp_path / out, {"train": 8, "test": 4})
    picture(tmp_path / "out/.cifar.123-abc.tmp/images/test/000000.jpg")
    made("cifar", tmp_path, tmp_path / "out", {"train": 8, "test": 4})
    assert ".cifar.123-abc.tmp is of a build that was killed, if none is running; remove it" in capsys.readouterr().err
