"""List files in the encodings and with the quotes that people's tools write."""

import pytest

from vpeft.data.listing import Line, read_lines, read_names
from vpeft.errors import DataError

TEXT = "# made by hand\n\nä b.mp4 3\nc.mp4 4"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("latin-1"),
        TEXT.replace("\n", "\r\n").encode("utf-8-sig"),
        TEXT.replace("\n", "\r").encode(),
        b"\xff\xfe" + TEXT.replace("\n", "\r\n").encode("utf-16-le"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
    ],
)
def test_one_list_in_seven_encodings(tmp_path, data):
    (tmp_path / "list.txt").write_bytes(data)
    assert read_lines(tmp_path / "list.txt") == [Line(3, "ä b.mp4 3"), Line(4, "c.mp4 4")]


@pytest.mark.parametrize(
    ("text", "last", "fields"),
    [
        ("a b.mp4 3", 1, ["a b.mp4", "3"]),
        ("a, b.mp4,3", 1, ["a, b.mp4", "3"]),
        ("a b.mp4 , 3", 1, ["a b.mp4", "3"]),
        ("a\t3", 1, ["a", "3"]),
        ("a;3", 1, ["a", "3"]),
        ("folder 16 3", 2, ["folder", "16", "3"]),
        ('"a, b.mp4",3', 1, ["a, b.mp4", "3"]),
        ('"a b.mp4" 3', 1, ["a b.mp4", "3"]),
        ('"a ""b"".mp4","3"', 1, ['a "b".mp4', "3"]),
        ('a"b.mp4 3', 1, ['a"b.mp4', "3"]),
        ('"a b"', 0, ["a b"]),
        ("a, b", 0, ["a, b"]),
        ("alone", 1, None),
        (",3", 1, None),
    ],
)
def test_fields_are_split_from_the_end_and_quotes_are_taken_off(text, last, fields):
    assert Line(1, text).fields(last) == fields


def test_what_the_last_fields_must_be_tells_the_separator():
    assert Line(1, "a, b;c.mp4 3").fields(1, str.isdecimal) == ["a, b;c.mp4", "3"]
    assert Line(1, "a b.mp4,x").fields(1, str.isdecimal) is None


def test_what_is_no_list_is_named(tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    with pytest.raises(DataError, match=r"binary\.txt: not a readable list: it holds bytes"):
        read_lines(tmp_path / "binary.txt")
    with pytest.raises(DataError, match=r"none\.txt: not a readable list of names: No such file"):
        read_names(tmp_path / "none.txt")
    (tmp_path / "names.txt").write_bytes('\ufeffcat\r\n"dog, big"\r\n'.encode())
    assert read_names(tmp_path / "names.txt") == ["cat", "dog, big"]


def test_spaces_around_quoted_fields_and_marks_of_joined_files(tmp_path):
    file = tmp_path / "list.csv"
    file.write_bytes(b'\xef\xbb\xbf\xef\xbb\xbf"a, b.mp4" , "big ""dog"""\n"c.mp4" ;7\n')
    assert [line.fields(1) for line in read_lines(file)] == [["a, b.mp4", 'big "dog"'], ["c.mp4", "7"]]
