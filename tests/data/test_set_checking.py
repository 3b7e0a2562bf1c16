"""``vpeft data list``, ``check`` and ``build``: what they say, and their exit status."""

import os
import shutil

import pytest
from PIL import Image

import vpeft
from tests.support.sets import few_shot, pictures, split_files, vtab
from vpeft.cli import main
from vpeft.data.sets.checking import check_root
from vpeft.data.sets.imagenet import wnids
from vpeft.data.sets.vtab import TASKS


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """KITTI as VTAB has it, whole: lists of the published sizes, and an image for each line."""
    root = tmp_path_factory.mktemp("whole")
    labels = [i % 4 for i in range(1000)]
    vtab(root, "kitti", {"train800": labels[:1]})
    image = root / "kitti/images/train800/000000.jpg"
    for name, found in (
        ("train800", labels[:800]),
        ("val200", labels[800:]),
        ("train800val200", labels),
        ("test", labels[:711]),
    ):
        (root / "kitti/images" / name).mkdir(exist_ok=True)
        lines = []
        for i, label in enumerate(found):
            path = f"images/{name}/{i:06d}.jpg"
            if not (root / "kitti" / path).exists():
                (root / "kitti" / path).hardlink_to(image)
            lines.append(f"{path} {label}\n")
        (root / "kitti" / f"{name}.txt").write_text("".join(lines))
    return root


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(
        whole, tmp_path / "copy", copy_function=lambda a, b: (os.link if a.endswith("jpg") else shutil.copy2)(a, b)
    )
    return tmp_path / "copy"


def status(*args):
    try:
        main(["data", *map(str, args)])
    except SystemExit as end:
        return end.code
    return 0


def test_a_whole_set_is_complete(whole, capsys):
    assert status("check", whole) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "vtab/kitti: complete (train800, val200, train800val200, test)" in lines
    assert "vtab/svhn: not there" in lines
    assert {f"vtab/{name}" for name in TASKS} <= {line.partition(":")[0] for line in lines}
    assert status("check", whole, "vtab/kitti") == 0
    assert status("check", whole, "vtab") == 1, "the other eighteen were asked for"
    assert status("check", whole, "fgvc/cub", "vtab/kitti") == 1


def kitti(root):
    (found,) = check_root(root, ["vtab/kitti"])
    assert not found.complete
    return str(found)


def test_what_is_wrong_is_said(copy):
    folder = copy / "kitti"
    (folder / "images/test/000005.jpg").unlink()
    (folder / "images/test/000009.jpg").unlink()
    assert "test: 2 of 711 images are not there, the first: " in kitti(copy)
    assert "000005.jpg" in kitti(copy)
    lines = (folder / "train800.txt").read_text().splitlines()
    (folder / "train800.txt").write_text("\n".join([*lines[:-1], lines[-1][:-1] + "0"]))
    assert "train800val200 has other labels than train800 and val200 together" in kitti(copy)
    (folder / "train800.txt").write_text("\n".join(lines[:-1]))
    assert "train800: 799 images, not 800" in kitti(copy)
    (folder / "train800.txt").write_text("\n".join([*lines[:-1], lines[-1][:-1] + "4"]))
    assert "has the label 4, but vtab/kitti has 4 classes" in kitti(copy)
    (folder / "val200.txt").unlink()
    assert "val200.txt is not there" in kitti(copy)
    test = (folder / "test.txt").read_text()
    (folder / "test.txt").write_text(test.replace(".jpg 3", ".jpg 2"))
    assert "test: 3 classes, not 4" in kitti(copy)
    (folder / "test.txt").write_text("images/a.jpg\n")
    assert "test.txt: line 1: expected a path" in kitti(copy)
    assert status("check", copy) == 1


def test_sets_of_other_layouts(tmp_path):
    split_files(tmp_path / "CUB_200_2011", "images", {"train": {"a.jpg": 1, "b.jpg": 4}, "test": {"c.jpg": 1}})
    few_shot(tmp_path / "food101/annotations", tmp_path / "food101/images", {"test_meta.list": [("t.jpg", 100)]})
    pictures(tmp_path / "imagenet-a", [f"{wnids('imagenet_a')[0]}/a.jpg"])
    found = {one.name: str(one) for one in check_root(tmp_path)}
    assert "train: 2 images, not 5394" in found["fgvc/cub"]
    assert "2 classes in the training list, not 200" in found["fgvc/cub"]
    assert "val.json is not there" in found["fgvc/cub"]
    assert "test: 1 images, not 30300" in found["fewshot/food101"]
    assert "and 1" in found["fewshot/food101"], "lists that are not there are not all said"
    assert "test: 1 images, not 7500" in found["imagenet-a"]
    assert "1 classes, not 200" in found["imagenet-a"]
    assert found["imagenet-r"] == "imagenet-r: not there"
    pictures(tmp_path / "imagenet/val", [f"{wnids()[0]}/v.JPEG"])
    found = {one.name: str(one) for one in check_root(tmp_path)}
    assert "test: 1 images, not 50000" in found["imagenet"]
    assert found["fewshot/imagenet"] == "fewshot/imagenet: not there", "no list of shots"


def test_a_folder_without_lists_is_incomplete_unless_it_is_another_sets(tmp_path):
    pictures(tmp_path / "svhn/images/test", ["000000.jpg"])
    split_files(tmp_path / "flowers102", "jpg", {"train": {"a.jpg": 1}})
    found = {one.name: one for one in check_root(tmp_path)}
    assert "svhn/test.txt is not there" in str(found["vtab/svhn"])
    assert not found["vtab/svhn"].complete
    assert found["fgvc/flowers"].there
    assert not found["vtab/oxford_flowers102"].there
    assert not found["fewshot/oxford-flowers102"].there


def test_nothing_there_and_no_folder(tmp_path, capsys):
    assert status("check", tmp_path) == 1
    assert status("check", tmp_path / "no") == 2
    assert "does not exist; give the one" in capsys.readouterr().err
    assert status("check", tmp_path, "vtab/kity") == 2
    assert "did you mean 'vtab/kitti'" in capsys.readouterr().err


def test_the_list_of_sets(capsys):
    assert status("list", "fgvc/") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["fgvc/cub", "fgvc/nabirds", "fgvc/flowers", "fgvc/dogs", "fgvc/cars"]
    assert "555 classes" in lines[1]


def test_building_is_a_command(tmp_path, capsys):
    assert status("build", "vtab/dmlab", "--out", tmp_path) == 2
    assert "dmlab cannot be rebuilt" in capsys.readouterr().err
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    assert status("build", "vtab/svhn", "--from", tmp_path, "--out", tmp_path / "out") == 2
    assert "train_32x32.mat" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_one_too_deep_or_too_high_is_told(whole, capsys):
    assert status("check", whole / "kitti", "vtab/kitti") == 1
    text = capsys.readouterr().out
    assert (
        "vtab/kitti: not there; give the folder that holds this one; expected, with ROOT = the folder: ROOT/kitti/train800"
        in text
    )
    assert status("check", whole.parent, "vtab/kitti") == 1
    assert f"vtab/kitti: not there; it seems to be in {whole}: give that" in capsys.readouterr().out
    assert status("check", whole / "kitti") == 1
    lines = capsys.readouterr().out.splitlines()
    assert "vtab/kitti: not there; give the folder that holds this one" in lines
    assert "vtab/svhn: not there" in lines
    file = whole / "kitti/test.txt"
    with pytest.raises(vpeft.DataError, match=f"'{file}' is a file, not a folder; give the one"):
        check_root(file)
