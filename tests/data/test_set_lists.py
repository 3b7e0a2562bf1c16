"""List files of benchmarks: what is read of them, and what is refused."""

import pytest

from vpeft.data.sets.lists import check_there, inside, listed, numbered, read_ids, read_labels
from vpeft.errors import DataError


@pytest.mark.parametrize("text", [
    "a/b.jpg 3\nwith a space.jpg 0\na/b.jpg 3\n",
    "\ufeffa/b.jpg 3\r\n\r\nwith a space.jpg 0\r\n   \r\na/b.jpg 3",
    "a/b.jpg\t3\rwith a space.jpg  0\ra/b.jpg 3\r",
])  # fmt: skip
def test_labels_stand_behind_the_last_space_and_lines_may_stand_twice(tmp_path, text):
    (tmp_path / "list.txt").write_bytes(text.encode())
    assert read_labels(tmp_path / "list.txt") == [("a/b.jpg", 3), ("with a space.jpg", 0), ("a/b.jpg", 3)]


def test_a_path_may_begin_with_a_number_sign(tmp_path):
    (tmp_path / "list.txt").write_text("#1.jpg 0\n")
    assert read_labels(tmp_path / "list.txt") == [("#1.jpg", 0)]


@pytest.mark.parametrize("line", ["a.jpg", "a.jpg x", "a.jpg -1", "a.jpg 1.0", "7", "a.jpg \u0663", "a.jpg 99999999999"])
def test_a_line_that_is_no_path_and_label_is_named(tmp_path, line):
    (tmp_path / "list.txt").write_text(f"ok.jpg 1\n\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"list\.txt: line 3: expected a path, a space and a label from 0"):
        read_labels(tmp_path / "list.txt")


def test_an_empty_list_is_refused(tmp_path):
    (tmp_path / "list.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"list\.txt names no image"):
        read_labels(tmp_path / "list.txt")


@pytest.mark.parametrize("name", ["/etc/a.jpg", "../a.jpg", "a/../../b.jpg", ".."])
def test_a_path_that_leads_out_of_the_root_is_refused(tmp_path, name):
    with pytest.raises(DataError, match=r"leads out of .*; paths are relative to it"):
        inside(tmp_path, name, tmp_path / "list.txt")
    assert inside(tmp_path, "a/../b.jpg", tmp_path / "list.txt") == tmp_path / "a/../b.jpg"


def test_missing_images_are_counted_and_the_first_is_named(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").touch()
    found = listed(tmp_path / "list", [("b.jpg", 0), ("a.jpg", 1), ("c.jpg", 1)], [tmp_path, tmp_path / "images"])
    with pytest.raises(DataError, match=r"2 of 3 images are not there, the first: .*images/b\.jpg"):
        check_there(found)


def test_ids_become_labels_by_the_training_list(tmp_path):
    (tmp_path / "train.json").write_text('\ufeff{"a b.jpg": 900, "c.jpg": "7", "d.jpg": 12}', encoding="utf-8")
    train = read_ids(tmp_path / "train.json")
    assert train == [("a b.jpg", 900), ("c.jpg", 7), ("d.jpg", 12)]
    ids = [one for _, one in train]
    assert numbered(ids, ids, tmp_path / "train.json", tmp_path / "train.json") == [2, 0, 1]
    assert numbered([900], ids, tmp_path / "test.json", tmp_path / "train.json") == [2], "not counted anew"
    with pytest.raises(DataError, match=r"test\.json has the class 8, which .*train\.json has not"):
        numbered([7, 8], ids, tmp_path / "test.json", tmp_path / "train.json")


@pytest.mark.parametrize(("text", "words"), [
    ('["a.jpg"]', "expected one mapping"),
    ("{}", "expected one mapping"),
    ('{"a.jpg": 1', "no JSON"),
    ('{"a.jpg": 1.5}', "'a.jpg' has the id 1.5, which is no whole number"),
    ('{"a.jpg": true}', "which is no whole number"),
    ('{"a.jpg": [1]}', "which is no whole number"),
    ('{"a.jpg": 1, "a.jpg": 2}', "'a.jpg' has two ids, 1 and 2"),
])  # fmt: skip
def test_a_file_of_ids_that_is_none_is_refused(tmp_path, text, words):
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(DataError, match=words):
        read_ids(tmp_path / "train.json")


def test_one_image_has_one_label(tmp_path):
    (tmp_path / "a.txt").write_text("a.jpg 1\nb.jpg 0\na.jpg 1\na.jpg 2\n")
    with pytest.raises(DataError, match=r"line 4: 'a\.jpg' has the label 2, in a line before 1"):
        read_labels(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["images\\a.jpg", "C:\\data\\a.jpg"])
def test_a_list_with_backslashes_says_what_would_be_right(tmp_path, name):
    (tmp_path / "a.txt").write_text(f"{name} 0\n")
    with pytest.raises(DataError, match=r"1 of 1 images are not there.*between slashes"):
        check_there(listed(tmp_path / "a.txt", read_labels(tmp_path / "a.txt"), [tmp_path]))
