"""Real runs into a zoo, and the zoo's commands run again."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import vpeft
from tests.zoo.conftest import SHORT
from vpeft.engine.config import load_config
from vpeft.engine.test import test as evaluate
from vpeft.engine.train import train
from vpeft.files import shipped
from vpeft.tasks.registry import TASKS
from vpeft.zoo.adding import add
from vpeft.zoo.using import main_metric

ROOT = Path(__file__).parents[2]
FLOOR = 1.0  # points by which two runs may differ whatever their spread: a seed's value says little of the next machine's


@pytest.mark.slow
def test_a_real_run_becomes_an_entry_that_has_its_metrics(tmp_path, monkeypatch):
    file, zoo = shipped("configs") / "digits/bitfit.yaml", tmp_path / "zoo"
    for seed in (3, 5):
        train(load_config(file, [*SHORT, f"seed={seed}", f"output={tmp_path / str(seed)}"]))
    runs = [tmp_path / str(seed) / "digits/bitfit" for seed in (3, 5)]
    entry, _ = add(runs, "mine", folder=zoo, cfg="configs/digits/bitfit.yaml")
    monkeypatch.setenv("VPEFT_ZOO", str(zoo))
    assert vpeft.zoo.verify() == {"mine": None}
    values = evaluate(load_config(file, SHORT), "zoo:mine")
    recorded = {metric["name"]: metric["values"] for metric in entry["metrics"]}
    assert values["top1"] == pytest.approx(recorded["test_top1"][0], abs=1e-3)
    assert json.loads((runs[1] / "metrics.json").read_text())["test_top1"] == pytest.approx(
        recorded["test_top1"][1], abs=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_cheapest_adapter_of_a_task_trains_again_to_its_metric(task, tmp_path):
    """By the command that the index gives. It must land within three standard deviations of the mean, or within ``FLOOR``."""
    entries = vpeft.zoo.list(task=task, kind="adapter")
    assert entries, f"the zoo has no adapter for {task}"
    cheapest = min(entries, key=lambda entry: entry.seconds or float("inf"))
    words = shlex.split(cheapest.command)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "vpeft.cli", *words[1:]], cwd=tmp_path, env=environment, check=True)
    (file,) = (tmp_path / "runs").rglob("metrics.json")
    expected = main_metric(cheapest)
    found = json.loads(file.read_text())[cheapest.metric]
    print(f"{cheapest.name}: {cheapest.metric} {found:.2f}, recorded {expected.mean:.2f} ± {expected.std or 0:.2f}")
    assert abs(found - expected.mean) <= max(3 * (expected.std or 0.0), FLOOR)
