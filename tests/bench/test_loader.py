"""The loader beside timm's."""

import pytest
import torch
from PIL import Image

from vpeft.bench import loader
from vpeft.cli import main
from vpeft.data.loader import SeededDataset, make_loader


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        path = tmp_path / "val" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + i, 50), (40 * i, 90, 200 - i)).save(path)
    return tmp_path


def test_both_give_the_same_batches(folder):
    config = loader.from_container(
        {
            "model": {"name": "vit_micro_patch4_28", "pretrained": False},
            "data": {"source": "folder", "root": str(folder), "train_split": "val", "test_split": "val"},
        }
    )
    pairs = zip(*loader.both(config, 4, 0).values(), strict=True)
    for (images, labels), (theirs, their_labels) in pairs:
        assert torch.equal(labels, their_labels)
        torch.testing.assert_close(images, theirs)


def test_the_command_prints_both_rates_and_their_ratio(folder, capsys):
    main(["bench-loader", str(folder), "--split", "val", "--model", "vit_micro_patch4_28", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["vpeft", "timm", "ratio"]
    assert all(float(line.split()[1]) > 0 for line in lines)


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("loader", ["--rounds", "0"], "rounds: 0 is impossible; it must be at least 1"),
        (
            "loader",
            ["--model", "vit_micro_patch4_82"],
            "timm has no 'vit_micro_patch4_82'; did you mean 'vit_micro_patch4_28'",
        ),
        ("loader", ["--split", "../x"], "split: '../x' is to be in a folder of yours"),
        ("decode", ["--clips", "0"], "clips: 0 is impossible"),
        ("decode", ["--frames", "0"], "frames: 0 is impossible"),
        ("decode", ["--stride", "0"], "stride: 0 is impossible"),
        ("decode", ["--size", "0"], "size: 0 is impossible; it must be at least 16"),
        ("decode", ["--workers", "-1"], "workers: -1 is impossible; it must be at least 0"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(command, arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([f"bench-{command}", *arguments])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_made_videos_of_an_odd_size(capsys):
    """Codecs want even sizes; the clips that are read have the size that was asked for."""
    main(["bench-decode", "--clips", "2", "--frames", "2", "--size", "33"])
    assert "(2 frames, stride 4, 16 files)" in capsys.readouterr().out


class Drawing(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.rand(2), index


def test_reading_a_batch_leaves_the_generators_as_they_were():
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    found = SeededDataset(Drawing(), 0).__getitems__([(0, i) for i in range(8)])
    assert torch.equal(torch.rand(4), wanted)
    values = torch.stack([x for x, _ in found])
    assert len(values.unique()) == 16
    for batch_size, workers in ((4, 0), (2, 2), (8, 0)):
        loader = make_loader(Drawing(), batch_size, train=False, workers=workers)
        assert torch.equal(torch.cat([x for x, _ in loader]), values)
