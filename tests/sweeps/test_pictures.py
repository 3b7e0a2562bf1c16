"""A sweep's pictures: whole or not at all, and what stands in them is no formula."""

import optuna
import pytest
from matplotlib.figure import Figure

from vpeft.errors import WriteError
from vpeft.sweeps.pictures import draw_importance, draw_parallel
from vpeft.sweeps.space import load_space

# As a formula it is an error of matplotlib.
ODD = r"a$\frac{$b"
SPACE = f"space: {{model.name: ['{ODD}', 'other'], optim.lr: {{low: 0.001, high: 0.1, log: true}}}}"


@pytest.fixture
def drawers(space, tmp_path):
    """Each picture's file, and what draws it."""
    found, study = load_space(space(SPACE)), optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    for _ in range(4):
        trial = study.ask()
        study.tell(trial, found.suggest(trial)["optim.lr"])
    return {
        tmp_path / "importance.png": lambda path: draw_importance(path, {"optim.lr": 0.7, ODD: 0.3}),
        tmp_path / "parallel.png": lambda path: draw_parallel(path, found, study.trials, f"val {ODD}"),
    }


def test_dollars_are_no_formulas(drawers):
    for path, draw in drawers.items():
        draw(path)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written_leaves_the_old_one(drawers, monkeypatch):
    def full(self, path, **options):
        with open(path, "wb") as stream:
            stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    for path, draw in drawers.items():
        path.write_bytes(b"old")
        with pytest.raises(WriteError, match=f"{path.name} cannot be written"):
            draw(path)
        assert path.read_bytes() == b"old"
        assert sorted(p.name for p in path.parent.iterdir() if "tmp" in p.name) == []
