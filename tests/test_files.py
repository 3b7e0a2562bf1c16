"""Files that appear whole or not at all."""

import os

import pytest
import torch
from safetensors.torch import load_file

import vpeft
from vpeft.errors import CheckpointError
from vpeft.files import existing_file, read_tensors, replacing, write_bytes, write_tensors, write_text


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def killed():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        killed()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_folders_are_made_and_the_new_file_takes_the_place(tmp_path):
    path = tmp_path / "deep" / "er" / "a.bin"
    write_bytes(path, b"one")
    write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]


def test_tensors_of_any_layout_with_their_metadata(tmp_path):
    whole = torch.randn(4, 6, requires_grad=True)
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"whole": whole, "again": whole, "turned": whole.T, "part": whole[1:3]}, {"why": "test"})
    metadata, tensors = read_tensors(path)
    assert metadata == {"why": "test"}
    for name, value in {"whole": whole, "again": whole, "turned": whole.T, "part": whole[1:3]}.items():
        assert torch.equal(tensors[name], value)
    write_tensors(path, {"x": whole})
    assert read_tensors(path)[0] == {}
    assert load_file(path).keys() == {"x"}


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(vpeft.CheckpointError, match=r"no\.safetensors does not exist"):
        read_tensors(tmp_path / "no.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"12345678901234567890")
    with pytest.raises(vpeft.CheckpointError, match=r"b\.safetensors is damaged or no safetensors file"):
        read_tensors(tmp_path / "b.safetensors")


def test_files_of_tensors_can_be_read_by_whom_other_files_can(tmp_path):
    before = os.umask(0o022)
    try:
        write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
        (tmp_path / "b").write_text("")
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_folder_in_place_of_a_file_says_what_is_in_it(tmp_path):
    with pytest.raises(CheckpointError, match=r"is a folder$"):
        existing_file(tmp_path)
    for name in ("best.safetensors", "last.safetensors", "state.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"is a folder; give a file of it: best\.safetensors, last\.safetensors$"):
        existing_file(tmp_path)
