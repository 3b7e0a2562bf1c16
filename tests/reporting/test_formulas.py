"""Names that somebody chose are no formulas in any picture, and a picture is written whole or not at all."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from vpeft.bench.report import plot as plot_bench
from vpeft.bench.result import Result
from vpeft.errors import WriteError
from vpeft.suites.table import _plot as plot_table
from vpeft.tasks.segmentation.pictures import draw_overlays
from vpeft.tasks.video.pictures import _draw as draw_clips

ODD = r"a$\frac{$b"  # as a formula it is an error of matplotlib
IMAGE = np.zeros((8, 8, 3), np.uint8)
ROW = {"experiment": ODD, "mean": 50.0, "std": 1.0, "with_head": 10, "split": "test", "metric": "accuracy"}
BENCH = SimpleNamespace(model=SimpleNamespace(name=ODD), experiment=None, batch_size=1, device="cpu", precision="fp32")
RATIOS = {"step/full": 1.0, "saved/full": 1.0}
DRAWN = {
    "table": lambda path: plot_table(path, [ROW]),
    "bench": lambda path: plot_bench(path, BENCH, [Result(ODD, 1, 1.0, None, 1.0, None, 1, None, RATIOS)]),
    "overlays": lambda path: draw_overlays([(IMAGE, IMAGE, IMAGE)], (ODD, "b"), [(0, 0, 0), (9, 9, 9)], path),
    "clips": lambda path: draw_clips([(torch.zeros(3, 2, 8, 8), ODD, "b", 0.5)], path),
}


@pytest.mark.parametrize("name", DRAWN)
def test_no_name_is_a_formula_and_half_a_picture_replaces_none(name, tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    DRAWN[name](path)
    whole = path.read_bytes()
    assert whole.startswith(b"\x89PNG")

    def full(self, place, **options):
        with open(place, "wb") as stream:
            stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(WriteError, match=r"picture\.png cannot be written"):
        DRAWN[name](path)
    assert path.read_bytes() == whole
