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
    with pytest.raises(SystemExit):
        main(["bench-loader", str(folder), "--rounds", "0"])


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
