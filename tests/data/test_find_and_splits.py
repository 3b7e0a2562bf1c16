"""What all tasks' data share: files in folders, parts for validation, class names, images."""

import pytest
from omegaconf import OmegaConf
from PIL import Image

from vpeft.data import find_images, open_image, read_image
from vpeft.data.find import find_files
from vpeft.data.splits import check_label, class_names, cut_validation, named_splits
from vpeft.errors import DataError


def test_files_and_what_folders_hold_in_the_order_given(tmp_path):
    for name in ("b/2.PNG", "b/deep/1.jpg", "b/notes.txt", "a.bmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_images([tmp_path / "b", tmp_path / "a.bmp"])
    assert [p.relative_to(tmp_path).as_posix() for p in found] == ["b/2.PNG", "b/deep/1.jpg", "a.bmp"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no image \(\.jpg"):
        find_images([tmp_path / "a.bmp", tmp_path / "empty"])
    with pytest.raises(DataError, match="nothing does not exist"):
        find_images([tmp_path / "nothing"])
    assert find_files([tmp_path / "b"], lambda folder: [folder / "x"], "x") == [tmp_path / "b" / "x"]


def test_an_image_is_read_whole_or_named(tmp_path):
    Image.new("L", (5, 3), 7).save(tmp_path / "grey.png")
    assert open_image(tmp_path / "grey.png").mode == "RGB"
    assert read_image(tmp_path / "grey.png").shape == (3, 5, 3)
    whole = (tmp_path / "grey.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:45])
    for name in ("cut.png", "none.png"):
        with pytest.raises(DataError, match=rf"{name.replace('.', '[.]')} is not a readable image"):
            open_image(tmp_path / name)


def test_the_validation_part_is_random_whole_and_follows_the_seed():
    kept, held = cut_validation(20, 5, 0, "images")
    assert sorted([*kept, *held]) == list(range(20))
    assert (len(held), list(held)) == (5, sorted(held))
    assert list(held) != [0, 1, 2, 3, 4]
    assert cut_validation(20, 5, 0, "images") == (kept, held)
    assert cut_validation(20, 5, 1, "images") != (kept, held)
    with pytest.raises(DataError, match="5 leaves nothing of 5 training clips"):
        cut_validation(5, 5, 0, "clips")


def test_class_names_come_from_the_nearest_source():
    data = OmegaConf.create({"classes": None, "num_classes": None, "source": "x"})
    assert class_names(data, ("a", "b"), 5) == ("a", "b")
    assert class_names(data, None, 3) == ("0", "1", "2")
    with pytest.raises(DataError, match="'x' names no classes"):
        class_names(data, None)
    data.num_classes = 2
    assert class_names(data, None, 3) == ("0", "1")
    data.classes = ["b", "a"]
    assert class_names(data, ("a", "b")) == ("b", "a"), "their order"
    assert class_names(data, None, 2) == ("b", "a")
    for names, words in (
        (["b", "a", "c"], "'x' has no class c"),
        (["b"], "'x' also has a; name all"),
        (["b", "b"], "the class 'b' stands twice"),
        (["b", " "], "a class without a name"),
    ):
        data.classes = names
        with pytest.raises(DataError, match=rf"data\.classes: .*{words}"):
            class_names(data, ("a", "b"))
    check_label(1, "ab", "train")
    with pytest.raises(DataError, match=r"train has the label 2, but there are 2 classes \(labels count from 0\)"):
        check_label(2, "ab", "train")


def test_splits_without_a_name_are_not_there():
    data = OmegaConf.create({"train_split": "train", "val_split": None, "test_split": ""})
    assert named_splits(data) == {"train": "train"}
