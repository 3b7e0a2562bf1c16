"""Benchmarks' sets on tiny made-up trees in the true layouts: labels, aliases, image roots, and what is refused."""

import json

import numpy as np
import pytest
from omegaconf import OmegaConf
from scipy.io import savemat

from tests.support.sets import few_shot, picture, pictures, split_files, vtab
from vpeft.data.sets import SETS, check_also, check_set, get_set, open_also, open_set
from vpeft.data.sets.imagenet import wnids
from vpeft.data.sets.vtab import NOTE
from vpeft.data.splits import named_splits
from vpeft.engine.config import DataConfig
from vpeft.errors import DataError


def section(root, source, **values):
    return OmegaConf.structured(DataConfig(source=source, root=str(root), **values))


def opened(data, part="train"):
    return open_set(data, data[f"{part}_split"], f"data.{part}_split", None)


def names(dataset, root):
    return [p.relative_to(root).as_posix() for p in dataset.files]


def refused(data, match):
    with pytest.raises(DataError, match=match):
        check_set(data, named_splits(data))


# ---- VTAB-1k ----

LISTS = {"train800": [1, 0, 2], "val200": [2], "train800val200": [1, 0, 2, 2], "test": [0, 1]}


def test_vtab_has_nineteen_tasks_of_a_thousand_images():
    found = [one for name, one in SETS.items() if name.startswith("vtab/")]
    assert len(found) == 19
    assert [one.classes for one in found] == [100, 102, 47, 102, 37, 10, 397, 2, 10, 45, 5, 8, 6, 6, 4, 16, 16, 18, 9]
    assert sum(one.sizes["test"] for one in found[:7]) == 10_000 + 6_084 + 1_880 + 6_149 + 3_669 + 26_032 + 21_750
    assert all(one.sizes["train800val200"] == 1000 for one in found)


@pytest.mark.parametrize(("source", "folder"), [
    ("vtab/cifar", "cifar"), ("vtab/cifar", "cifar_100"), ("VTAB/cifar100", "vtab-cifar"), ("vtab/vtab-cifar", "cifar100"),
])  # fmt: skip
def test_vtab_under_all_names_of_its_folder(tmp_path, source, folder):
    data = section(vtab(tmp_path, folder, LISTS), source, train_split="train800", val_split="val200")
    check_set(data, named_splits(data))
    train, val = opened(data), opened(data, "val")
    assert names(train, tmp_path / folder) == [f"images/train800/{i:06d}.jpg" for i in range(3)]
    assert (train.labels, val.labels, opened(data, "test").labels) == ([1, 0, 2], [2], [0, 1])
    assert (train.count, train.names, train.notes) == (100, None, {"pixels": "zip-jpeg"})
    assert np.asarray(train[0][0]).max() == 10, "the image of the label 1"


def test_vtab_trains_on_the_thousand_where_nothing_is_said(tmp_path, caplog):
    data = section(vtab(tmp_path, "svhn", LISTS), "vtab/svhn")
    assert opened(data).labels == [1, 0, 2, 2]
    assert "train800val200 has 4 images, the published split 1000" in caplog.text


def test_a_folder_of_another_name_is_taken_only_with_lists(tmp_path):
    (tmp_path / "oxford_pet" / "images").mkdir(parents=True)
    vtab(tmp_path, "pets", LISTS)
    assert len(opened(section(tmp_path, "vtab/oxford_iiit_pet"))) == 4


@pytest.mark.parametrize(("note", "ending", "pixels"), [
    (None, ".png", "exact"), ("exact", ".jpg", "exact"), ("zip-jpeg", ".png", "zip-jpeg"), ("??", ".jpg", "zip-jpeg"),
])  # fmt: skip
def test_vtab_says_how_its_pixels_were_stored(tmp_path, note, ending, pixels):
    vtab(tmp_path, "dtd", LISTS, ending)
    if note:
        (tmp_path / "dtd" / NOTE).write_text(json.dumps({"pixels": note, "note": "drawn"}))
    assert opened(section(tmp_path, "vtab/dtd")).notes == {"pixels": pixels} | ({"data_note": "drawn"} if note else {})
    (tmp_path / "dtd" / NOTE).write_text("[1")
    assert opened(section(tmp_path, "vtab/dtd")).notes["pixels"] in ("exact", "zip-jpeg")


def test_vtab_refuses_what_is_missing_with_the_layout(tmp_path):
    data = section(tmp_path, "vtab/cifar")
    refused(
        data, r"cifar/train800val200\.txt does not exist; expected, with ROOT = .*ROOT/cifar/train800\.txt.*images/test/"
    )
    refused(
        section(tmp_path / "no", "vtab/cifar"), r"data\.root: folder .* does not exist; 'vtab/cifar' expects.*ROOT/cifar/"
    )
    refused(section(tmp_path, "vtab/cifr"), r"data\.source: there is no set 'vtab/cifr'; did you mean 'vtab/cifar'")
    vtab(tmp_path, "cifar", LISTS)
    (tmp_path / "cifar/images/test/000001.jpg").unlink()
    with pytest.raises(DataError, match=r"test\.txt: 1 of 2 images are not there, the first: .*test/000001\.jpg"):
        opened(data, "test")
    refused(section(tmp_path, "vtab/cifar", test_split="testing"), r"data\.test_split: 'vtab/cifar' has no split 'testing'")


def test_a_label_that_the_task_has_not_is_refused(tmp_path):
    """Lists that count from 1, or those of another task."""
    vtab(tmp_path, "kitti", {"train800val200": [1, 4], "test": [0]})
    with pytest.raises(DataError, match=r"train800val200\.txt has the label 4, but vtab/kitti has 4 classes, .*000001\.jpg"):
        opened(section(tmp_path, "vtab/kitti"))


@pytest.mark.parametrize(("splits", "words"), [
    ({"val_split": "val200"}, "train800val200 and val200 share|val200 and train800val200 share"),
    ({"val_split": "val"}, "share"),
    ({"train_split": "train800", "val_split": "test"}, "test: the val split and the test split would hold the same images"),
    ({"train_split": "test"}, "would hold the same images"),
    ({"val_split": "train800"}, "share train800"),
])  # fmt: skip
def test_splits_that_share_images_are_refused(tmp_path, splits, words):
    refused(section(vtab(tmp_path, "svhn", LISTS), "vtab/svhn", **splits), words)


# ---- FGVC ----


@pytest.mark.parametrize(("source", "folder", "images"), [
    ("fgvc/cub", "CUB_200_2011", "images"), ("fgvc/nabirds", "nabirds", "images"), ("fgvc/flowers", "OxfordFlower", ""),
    ("fgvc/dogs", "StanfordDogs", "Images"), ("fgvc/stanford_cars", "stanford_cars", ""),
])  # fmt: skip
def test_fgvc_split_files_number_sparse_ids_by_the_training_file(tmp_path, source, folder, images):
    train = {"a/b c.jpg": 900, "a/d.jpg": 7, "e.jpg": 12}
    split_files(tmp_path / folder, images, {"train": train, "val": {"v.jpg": 12}, "test": {"t.jpg": 900, "u.jpg": 12}})
    data = section(tmp_path, source, val_split="val")
    check_set(data, named_splits(data))
    found = opened(data)
    assert (found.labels, found.count) == ([2, 0, 1], 3)
    assert names(found, tmp_path / folder / images) == ["a/b c.jpg", "a/d.jpg", "e.jpg"]
    assert (opened(data, "val").labels, opened(data, "test").labels) == ([1], [2, 1])
    assert opened(data, "test").count == 3, "not the test file's"
    both = section(tmp_path, source, train_split="trainval")
    assert opened(both).labels == [2, 0, 1, 1]
    refused(section(tmp_path, source, train_split="trainval", val_split="val"), "share val")


def test_fgvc_refuses_a_test_class_that_is_not_trained_and_more_classes_than_there_are(tmp_path):
    split_files(tmp_path / "nabirds", "images", {"train": {"a.jpg": 1}, "test": {"b.jpg": 2}})
    with pytest.raises(DataError, match=r"test\.json has the class 2, which .*train\.json has not"):
        opened(section(tmp_path, "fgvc/nabirds"), "test")
    names = {f"{i}.jpg": i for i in range(121)}
    split_files(tmp_path / "dogs", "Images", {"train": names, "test": {"b.jpg": 2}})
    with pytest.raises(DataError, match=r"has the label 120, but fgvc/dogs has 120 classes"):
        opened(section(tmp_path, "fgvc/dogs"))


def official_birds(folder):
    folder.mkdir(parents=True)
    rows = [("k-1", "001.Albatross/x 1.jpg", 5, 1), ("k-2", "002.Auk/y.jpg", 40, 1), ("k-3", "001.Albatross/z.jpg", 5, 0)]
    for name, column in (("images.txt", 1), ("image_class_labels.txt", 2), ("train_test_split.txt", 3)):
        (folder / name).write_text("".join(f"{row[0]} {row[column]}\n" for row in rows))
    pictures(folder / "images", [row[1] for row in rows])


def official_dogs(folder):
    folder.mkdir(parents=True)
    for part, files, labels in (("train", ["n1-a/1.jpg", "n2-b/2.jpg"], [3, 9]), ("test", ["n1-a/3.jpg"], [3])):
        savemat(
            folder / f"{part}_list.mat", {"file_list": np.array(files, object)[:, None], "labels": np.array(labels)[:, None]}
        )
        pictures(folder / "Images", files)


def official_cars(folder):
    (folder / "devkit").mkdir(parents=True)
    kind = [("bbox_x1", "i4"), ("class", "i4"), ("fname", "O")]
    for part, name, rows in (
        ("train", "cars_train_annos.mat", [(0, 14, "00001.jpg"), (0, 91, "00002.jpg")]),
        ("test", "cars_test_annos_withlabels.mat", [(0, 14, "00001.jpg")]),
    ):
        savemat(folder / "devkit" / name, {"annotations": np.array(rows, kind)[None]})
        pictures(folder / f"cars_{part}", [row[2] for row in rows])


def official_flowers(folder):
    folder.mkdir(parents=True)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[77, 5, 77, 5]])})
    savemat(folder / "setid.mat", {"trnid": np.array([[1, 2]]), "valid": np.array([[4]]), "tstid": np.array([[3]])})
    pictures(folder / "jpg", [f"image_{i:05d}.jpg" for i in range(1, 5)])


@pytest.mark.parametrize(("source", "folder", "make", "labels", "first", "test"), [
    ("fgvc/cub", "CUB_200_2011", official_birds, [0, 1], "images/001.Albatross/x 1.jpg", "images/001.Albatross/z.jpg"),
    ("fgvc/nabirds", "nabirds", official_birds, [0, 1], "images/001.Albatross/x 1.jpg", "images/001.Albatross/z.jpg"),
    ("fgvc/dogs", "StanfordDogs", official_dogs, [0, 1], "Images/n1-a/1.jpg", "Images/n1-a/3.jpg"),
    ("fgvc/cars", "stanford_cars", official_cars, [0, 1], "cars_train/00001.jpg", "cars_test/00001.jpg"),
    ("fgvc/flowers", "flowers102", official_flowers, [1, 0], "jpg/image_00001.jpg", "jpg/image_00003.jpg"),
])  # fmt: skip
def test_fgvc_official_lists(tmp_path, source, folder, make, labels, first, test):
    make(tmp_path / folder)
    data = section(tmp_path, source, train_split="official_train", test_split="official_test")
    check_set(data, named_splits(data))
    train, judged = opened(data), opened(data, "test")
    assert (train.labels, train.count, names(train, tmp_path / folder)[0]) == (labels, 2, first)
    assert (names(judged, tmp_path / folder), judged.labels) == ([test], labels[:1])
    refused(section(tmp_path, source), r"train\.json does not exist; expected.*official_train")
    split_files(tmp_path / folder, "images", {s: {"a.jpg": 1} for s in ("train", "val", "test")})
    mixed = section(tmp_path, source, train_split="official_train", val_split="val", test_split="official_test")
    refused(mixed, "come from different lists")


# ---- few shots ----


def shots(k, seed=0):
    return f"train_meta.list.num_shot_{k}.seed_{seed}"


PAIRS = {
    shots(1): [("a 1.jpg", 0), ("b.jpg", 1), ("a 1.jpg", 0), ("b.jpg", 1)], shots(2, 1): [("c.jpg", 1)],
    "val_meta.list": [("v.jpg", 0)], "test_meta.list": [("t.jpg", 1)],
}  # fmt: skip


@pytest.mark.parametrize(("source", "lists", "images"), [
    ("fewshot/oxford-pets", "oxford-pets", "oxford-pets/images"),  # NOAH
    ("fewshot/oxford-pets", "oxford-pets", "oxford_pets/images"),
    ("fewshot/oxford_pets", "few-shot_split/oxford-pets", "oxford-pets"),  # DTL
    ("fewshot/fgvc-aircraft", "fgvc-aircraft", "fgvc-aircraft-2013b/data/images"),  # torchvision
    ("fewshot/food101", "food101", "food-101/images"),
    ("fewshot/stanford_cars", "standford-cars", "stanford_cars"),
    ("fewshot/oxford-flowers102", "oxford-flowers102", "flowers-102/jpg"),
])  # fmt: skip
def test_few_shot_lists_and_images_of_other_folders(tmp_path, source, lists, images):
    few_shot(tmp_path / lists / "annotations", tmp_path / images, PAIRS)
    data = section(tmp_path, source, shots=1, val_split="val")
    check_set(data, named_splits(data))
    train = opened(data)
    assert (train.labels, names(train, tmp_path / images)) == ([0, 1, 0, 1], ["a 1.jpg", "b.jpg"] * 2), "as listed, twice"
    assert (opened(data, "val").labels, opened(data, "test").labels) == ([0], [1])
    assert opened(section(tmp_path, source, shots=2, list_seed=1)).labels == [1]


def test_few_shot_images_elsewhere(tmp_path):
    few_shot(tmp_path / "food101/annotations", tmp_path / "pictures", PAIRS)
    with pytest.raises(
        DataError, match=r"are not there, the first: .*; bring them, or say where they are \(data\.image_root\)"
    ):
        opened(section(tmp_path, "fewshot/food101", shots=1))
    for root in ("pictures", str(tmp_path / "pictures")):
        assert len(opened(section(tmp_path, "fewshot/food101", shots=1, image_root=root))) == 4


def test_few_shot_keys_that_do_not_fit(tmp_path):
    few_shot(tmp_path / "food101/annotations", tmp_path / "food101/images", PAIRS)
    vtab(tmp_path, "svhn", LISTS)
    for values, words in (
        ({}, r"data\.shots: say how many .*1, 2, 4, 8, 16"),
        ({"shots": 3}, r"data\.shots: there are lists of 1, 2, 4, 8, 16 shots, not of 3"),
        ({"shots": 4}, r"num_shot_4\.seed_0 does not exist; expected.*image_root"),
        ({"list_seed": 1}, r"data\.shots: say how many"),
    ):
        refused(section(tmp_path, "fewshot/food101", **values), words)
    refused(section(tmp_path, "vtab/svhn", shots=1), r"data\.shots: 'vtab/svhn' has no lists of shots")
    refused(section(tmp_path, "vtab/svhn", list_seed=1), r"data\.list_seed: 'vtab/svhn' has no lists")
    refused(section(tmp_path, "vtab/svhn", image_root="x"), r"data\.image_root: the lists of 'vtab/svhn'")
    data = section(tmp_path, "fewshot/food101", train_split="")
    check_set(data, named_splits(data))  # a test alone needs no shots


def test_the_pets_lists_of_one_shot_have_74_lines():
    pets = get_set("fewshot/oxford-pets")
    from vpeft.data.sets import Asked

    assert [pets.size("train", Asked(None, k)) for k in (1, 2, 16)] == [74, 74, 592]


# ---- ImageNet and other domains ----

FIRST = wnids()[:3]


def imagenet(root):
    few_shot(root / "imagenet/annotations", root / "imagenet/train", {
        shots(16): [(f"{w}/{w}_{i}.JPEG", label) for label, w in enumerate(FIRST) for i in range(2)],
    })  # fmt: skip
    pictures(root / "imagenet/val", [f"{FIRST[2]}/ILSVRC2012_val_1.JPEG", f"{FIRST[0]}/ILSVRC2012_val_2.JPEG"])


def test_imagenet_of_few_shots(tmp_path):
    imagenet(tmp_path)
    for source in ("imagenet", "fewshot/imagenet"):
        data = section(tmp_path, source, shots=16)
        check_set(data, named_splits(data))
        assert opened(data).labels == [0, 0, 1, 1, 2, 2]
        assert opened(data, "test").labels == [0, 2]
        assert opened(data).names == wnids()
    refused(section(tmp_path, "imagenet", shots=16, val_split="val"), "would hold the same images")


def test_imagenets_images_elsewhere_are_still_two_folders(tmp_path):
    imagenet(tmp_path)
    (tmp_path / "ILSVRC").mkdir()
    for part in ("train", "val"):
        (tmp_path / "imagenet" / part).rename(tmp_path / "ILSVRC" / part)
    data = section(tmp_path, "imagenet", shots=16, image_root="ILSVRC")
    check_set(data, named_splits(data))
    assert opened(data).labels == [0, 0, 1, 1, 2, 2]
    assert names(opened(data, "test"), tmp_path)[0].startswith("ILSVRC/val/")


def test_imagenet_validation_in_one_folder_is_read_by_its_list(tmp_path):
    few_shot(
        tmp_path / "imagenet/annotations", tmp_path / "imagenet/val", {"val_meta.list": [("b.JPEG", 65), ("a.JPEG", 7)]}
    )
    pictures(tmp_path / "imagenet/train", [f"{w}/1.JPEG" for w in FIRST])
    data = section(tmp_path, "imagenet")
    assert opened(data).labels == [0, 1, 2]
    assert opened(data, "test").labels == [65, 7]
    (tmp_path / "imagenet/annotations/val_meta.list").unlink()
    with pytest.raises(DataError, match=r"val_meta\.list, which says theirs, is not there"):
        opened(data, "test")


@pytest.mark.parametrize("folder", [
    "imagenetv2-matched-frequency-format-val", "imagenetv2/imagenetv2-matched-frequency-format-val", "imagenet-v2",
])  # fmt: skip
def test_the_folders_of_imagenet_v2_are_numbers_not_names_in_alphabetical_order(tmp_path, folder):
    numbers = [0, 1, 2, 10, 100, 999]
    pictures(tmp_path / folder, [f"{n}/x.jpeg" for n in numbers])
    assert opened(section(tmp_path, "imagenet-v2"), "test").labels == numbers
    picture(tmp_path / folder / "1000" / "x.jpeg")
    with pytest.raises(DataError, match="folders 0 to 999, the numbers of the classes; 1000 is none"):
        opened(section(tmp_path, "imagenet-v2"), "test")


@pytest.mark.parametrize(("source", "folder", "subset"), [
    ("imagenet-a", "imagenet-a", "imagenet_a"), ("imagenet-a", "imagenet-adversarial/imagenet-a", "imagenet_a"),
    ("imagenet-r", "imagenet-r", "imagenet_r"), ("imagenet-r", "imagenet-rendition/imagenet-r", "imagenet_r"),
])  # fmt: skip
def test_sets_of_two_hundred_classes_have_the_numbers_of_the_thousand(tmp_path, source, folder, subset):
    chosen = wnids(subset)
    assert len(chosen) == 200
    pictures(tmp_path / folder, [f"{chosen[i]}/a picture.jpg" for i in (5, 199)])
    (tmp_path / "imagenet-adversarial/annotations").mkdir(parents=True, exist_ok=True)
    found = opened(section(tmp_path, source), "test")
    assert found.labels == [wnids().index(chosen[i]) for i in (5, 199)]
    assert [wnids()[i] for i in found.within] == sorted(chosen)


def test_sketch_and_folders_that_are_no_class(tmp_path):
    pictures(tmp_path / "imagenet-sketch/images", [f"{w}/s.JPEG" for w in FIRST[::-1]])
    found = opened(section(tmp_path, "imagenet-sketch"), "test")
    assert (found.labels, found.within) == ([0, 1, 2], None)
    picture(tmp_path / "imagenet-sketch/images/goldfish/s.JPEG")
    with pytest.raises(DataError, match=r"named by WordNet's id; goldfish is none of the 1,000"):
        opened(section(tmp_path, "imagenet-sketch"), "test")
    refused(section(tmp_path, "imagenet-a", train_split=""), r"imagenet-a \(test\): .* does not exist; expected.*<wnid>")
    refused(section(tmp_path, "imagenet-sketch"), r"data\.train_split: 'imagenet-sketch' has no split 'train'")


def test_further_test_sets_lie_below_the_same_root(tmp_path):
    imagenet(tmp_path)
    pictures(tmp_path / "imagenet-a", [f"{wnids('imagenet_a')[0]}/a.jpg"])
    data = section(tmp_path, "imagenet", shots=16, also_test=["imagenet_a"])
    check_also(data)
    assert {name: len(found) for name, found in open_also(data, None).items()} == {"imagenet-a": 1}
    for chosen, words in (
        (["imagenet-b"], r"data\.also_test: there is no set 'imagenet-b'; did you mean"),
        (["imagenet"], "'imagenet' is tested already"),
        (["fewshot/imagenet"], "'fewshot/imagenet' is tested already"),
        (["imagenet-a", "imagenet-adversarial"], "'imagenet-a' is tested already"),
        (["vtab/svhn"], "the labels of 'vtab/svhn' are numbers"),
        (["imagenet-r"], r"imagenet-r \(test\): .* does not exist; expected"),
    ):
        data.also_test = chosen
        with pytest.raises(DataError, match=words):
            check_also(data)


def test_of_two_copies_the_whole_one_is_read_and_of_two_whole_ones_a_line_tells_which(tmp_path, caplog):
    vtab(tmp_path, "cifar", {"train800": [0, 1]})
    vtab(tmp_path, "cifar100", {"train800val200": [0, 1, 2], "test": [0]})
    assert len(opened(section(tmp_path, "vtab/cifar")).files) == 3
    assert "are there" not in caplog.text
    vtab(tmp_path, "cifar_100", {"train800val200": [0, 1], "test": [0]})
    opened(section(tmp_path, "vtab/cifar"))
    assert "cifar100 is read" in caplog.text
    (tmp_path / "links").mkdir()
    caplog.clear()
    vtab(tmp_path / "links", "pets", {"train800val200": [0, 1], "test": [0]})
    (tmp_path / "links/oxford_pet").symlink_to(tmp_path / "links/pets")
    opened(section(tmp_path / "links", "vtab/oxford_iiit_pet"))
    assert "are there" not in caplog.text, "one copy under two names"


def test_a_root_one_step_too_high_is_named(tmp_path):
    vtab(tmp_path / "vtab-1k", "kitti", {"train800val200": [0], "test": [0]})
    refused(section(tmp_path, "vtab/kitti"), "it seems to be in .*vtab-1k: give that")
