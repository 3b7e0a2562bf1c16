"""The measurement of mixed-task batches, on a small model: what is computed is compared, times only have to be there."""

import csv
import sys
import types

import pytest
import timm
import torch

import vpeft
from tests.support.bench import tiny_table
from vpeft.bench import routing
from vpeft.bench.config import load_routing_config
from vpeft.bench.routing import Mixed, PeftMixed, bench_route, measure_routing
from vpeft.bench.rows import classifier
from vpeft.cli import main
from vpeft.methods import create

ROWS = "[{name: lora, options: {rank: 2}}, {name: bitfit, label: biases}]"
TINY = {"tasks": 3, "batch_size": 7, "rounds": 2}
PASSES = ("single", "routed", "switched", "copies", "step_single", "step_routed", "step_copies")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_table(ROWS, output=tmp_path / "out", **TINY))
    return path


def made(file, *overrides: str, cls=Mixed, options=None):
    config = load_routing_config(file, overrides)
    base, batch = classifier(config)
    base.model.to(getattr(torch, config.dtype)).eval()
    batch.images = batch.images.to(getattr(torch, config.dtype))
    row = config.rows[0]
    return cls("row", base, batch, config, **(options or {"method": create(row.name, **row.options)}))


def test_writes_table_and_numbers(file, tmp_path, capsys):
    results = bench_route(file, ["training=true"])
    assert [r.label for r in results] == ["lora", "biases"]
    assert results[0].parameters == 3 * 2 * 2 * (32 + 32)  # blocks, q and v, rank
    for r in results:
        assert set(r.times) == set(PASSES)
        assert all(t > 0 for t in r.times.values())
        assert set(r.ratios) == set(PASSES) - {"single", "step_single"}
        assert r.difference < 1e-5
    assert "| lora | 768 |" in capsys.readouterr().out
    with open(tmp_path / "out" / "tiny.csv") as stream:
        table = list(csv.DictReader(stream))
    assert float(table[1]["routed_s"]) == pytest.approx(results[1].times["routed"], abs=1e-6)
    assert float(table[1]["throughput_routed"]) == pytest.approx(results[1].ratios["routed"], abs=1e-6)
    assert table[0]["throughput_mixed/above"] == ""
    text = (tmp_path / "out" / "tiny.md").read_text()
    assert text.startswith("vit_tiny_patch16_224, batch 7 over 3 interleaved tasks, float32, CPU, 1 thread(s), wall time")


def test_ratios_are_of_throughput_within_the_rounds(file, monkeypatch):
    """With a clock that gives the passes' times: half of the single-task time is a throughput of two."""
    seconds = {"single": [1.0, 3.0, 8.0], "routed": [2.0, 3.0, 4.0], "switched": [10.0, 1.0, 4.0], "copies": [1.0, 3.0, 8.0]}
    counts = dict.fromkeys(seconds, 0)

    def timed(self, run):
        name = {"on_copies": "copies"}.get(run.__name__, run.__name__)
        counts[name] += 1
        return seconds[name][counts[name] - 1]

    monkeypatch.setattr(routing.Batch, "time", timed)
    (row,) = measure_routing(load_routing_config(file, ["rounds=3", "rows=[{name: lora}]"]))
    assert row.ratios == {"routed": 1.0, "switched": 2.0, "copies": 1.0}  # medians of (.5, 1, 2), (.1, 3, 2), (1, 1, 1)
    assert row.times["switched"] == 4.0


@pytest.mark.parametrize("name", ["lora", "bitfit"])
def test_every_pass_computes_what_it_is_said_to(file, name):
    row = made(file, "dtype=float64", f"rows=[{{name: {name}}}]")
    assert row.tasks == ["task0", "task1", "task2"] * 2 + ["task0"]
    routed, switched, copies, single = row.routed(), row.switched(), row.on_copies(), row.single()
    assert routed.dtype == torch.float64
    for i in range(3):
        assert (routed[i::3] - switched[i]).abs().max() < 1e-12
        assert (routed[i::3] - copies[i]).abs().max() < 1e-12
    changed = (routed - single).abs().amax(1)
    assert changed[::3].max() < 1e-12
    assert changed[[1, 2, 4, 5]].min() > 1e-3, "the tasks differ"
    assert row.difference() < 1e-12
    assert not any(handle.enabled for handle in row.handles)
    routed[1, 0] += 0.25  # a wrong output is seen
    row.routed = lambda: routed
    assert row.difference() == pytest.approx(0.25)


@pytest.mark.parametrize("name", ["lora", "bitfit"])
def test_steps_reach_every_task_and_move_nothing(file, name):
    row = made(file, "training=true", f"rows=[{{name: {name}}}]")
    before = [v.clone() for h in row.handles for v in h.state_dict().values()]
    steps = row.steps()
    seen = []
    for key, run in steps.items():
        run()
        seen.append(key)
    groups = row.optimizers
    assert set(groups) == {"single", "routed", 0, 1, 2}
    own = {id(p) for h in row.handles for p in h.trainable_parameters()}
    assert {id(p) for g in groups["routed"].param_groups for p in g["params"]} == own
    assert len(groups["routed"].state) == len(own), "each got a gradient"
    after = [v for h in row.handles for v in h.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_heads_of_different_widths(file):
    row = made(file, "widths=[4,6]", "training=true")
    assert [h.head_state_dict()["head.bias"].numel() for h in row.handles] == [4, 6, 4]
    assert [len(o) for o in row.routed()] == [4, 6, 4, 4, 6, 4, 4]
    assert row.difference() < 1e-5
    for run in row.steps().values():
        run()
    assert all(label < width for label, width in zip(row.labels, [4, 6, 4, 4, 6, 4, 4], strict=True))


def test_without_separate_forwards(file):
    (row,) = measure_routing(load_routing_config(file, ["separate=false", "rows=[{name: lora}]"]))
    assert set(row.times) == {"single", "routed"}
    assert row.difference < 1e-5


def test_a_swin(tmp_path):
    small = {"img_size": 48, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    path = tmp_path / "swin.yaml"
    model = {"name": "swin_tiny_patch4_window7_224", "kwargs": small}
    path.write_text(tiny_table(ROWS, output=tmp_path, model=model, **TINY))
    (row,) = measure_routing(load_routing_config(path, ["rounds=1", "rows=[{name: ssf}]"]))
    assert row.difference < 1e-5


class FakePeft(torch.nn.Module):
    """A stand-in for huggingface's: tasks differ by a vector behind the model."""

    def __init__(self, model, settings, adapter_name):
        super().__init__()
        self.model, self.settings, self.now = model, settings, adapter_name
        self.lora_b = torch.nn.ParameterDict({adapter_name: torch.zeros(5)})

    def add_adapter(self, name, settings):
        self.lora_b[name] = torch.nn.Parameter(torch.zeros(5))

    def set_adapter(self, name):
        self.now = name

    def forward(self, x, adapter_names=None):
        names = adapter_names or [self.now] * len(x)
        return self.model(x) + torch.stack([self.lora_b[n] for n in names])


def test_row_of_huggingface(file, monkeypatch):
    """With a stand-in for the library, which need not be installed; it is measured in the rounds of the row before it."""
    rows = "rows=[{name: lora}, {name: huggingface_lora, options: {rank: 3}}]"
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(vpeft.ConfigError, match="needs huggingface's peft"):
        list(measure_routing(load_routing_config(file, [rows])))
    fake = types.SimpleNamespace(LoraConfig=lambda **k: k, get_peft_model=FakePeft)
    monkeypatch.setitem(sys.modules, "peft", fake)
    ours, theirs = measure_routing(load_routing_config(file, [rows, "training=true"]))
    assert set(theirs.times) == {"single", "routed", "switched"}
    assert set(theirs.ratios) == {"routed", "switched", "mixed/above"}
    assert "mixed/above" not in ours.ratios
    assert theirs.difference < 1e-5
    row = made(file, cls=PeftMixed, options={"rank": 3, "targets": ["qkv"], "alpha": 8.0})
    assert row.model.settings == {"r": 3, "lora_alpha": 8.0, "target_modules": ["qkv"], "modules_to_save": ["head"]}
    assert (row.routed() - row.single()).abs().amax(1)[[1, 2, 4, 5]].min() > 1e-3, "the tasks differ"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task=4", r"task: unknown key; did you mean 'tasks'"),
        ("tasks=8", r"tasks: 8 tasks do not all have a sample in a batch of 7"),
        ("dtype=float16", r"dtype: 'float16' is not one of float32, float64; did you mean"),
        ("widths=[0]", r"widths\[0\]: 0 is impossible"),
        ("clock=cpu threads=2", r"clock: processor time"),
        ("dtype=float64 precision=bf16", r"precision: dtype=float64 is computed as it is"),
        ("rows=[]", r"rows: nothing to measure"),
        ("rows=[{name: huggingface_lora}]", r"measured beside the row before it, and has none"),
    ],
)
def test_refused_while_reading(file, override, message):
    with pytest.raises(vpeft.ConfigError, match=message):
        load_routing_config(file, override.split(" ") if not override.startswith("rows") else [override])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("[{name: lorra}]", r"rows: unknown method 'lorra'; did you mean 'lora'"),
        ("[{name: lora}, {name: lora}]", r"rows: two are called 'lora'"),
        ("[{name: lora}, {name: huggingface_lora, options: {r: 2}}]", r"rows: huggingface_lora has no option 'r'"),
    ],
)
def test_refused_before_a_model_is_built(file, rows, message, monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: pytest.fail("a model was built"))
    monkeypatch.setattr(routing, "peft_installed", lambda: True)
    with pytest.raises(vpeft.ConfigError, match=message):
        list(measure_routing(load_routing_config(file, [f"rows={rows}"])))


def test_what_cannot_be_routed_is_refused_before_anything_is_measured(file, monkeypatch):
    monkeypatch.setattr(routing.Batch, "time", lambda *a: pytest.fail("something was measured"))
    with pytest.raises(vpeft.MethodError, match=r"magnitude.*another weight for each sample"):
        list(measure_routing(load_routing_config(file, ["rows=[{name: lora}, {name: magnitude}]"])))


def test_the_command(file, tmp_path, capsys):
    main(["bench-route", "--cfg", str(file), "rounds=1", "rows=[{name: ssf}]", "name=other"])
    assert "| ssf |" in capsys.readouterr().out
    assert (tmp_path / "out" / "other.csv").exists()
    with pytest.raises(SystemExit) as stop:
        main(["bench-route", "--cfg", str(file), "tasks=9"])
    assert stop.value.code == 2
    assert "ConfigError: tasks: 9 tasks" in capsys.readouterr().err
