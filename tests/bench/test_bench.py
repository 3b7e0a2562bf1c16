"""The measurement of time and memory, on a model of which every number is known."""

import csv
import sys
import types
from pathlib import Path

import pytest
import timm
import torch
from omegaconf import OmegaConf

import vpeft
from tests.support.bench import segmentation_table, tiny_table
from tests.support.models import SMALL
from vpeft.bench import rows as bench_rows
from vpeft.bench.config import load_bench_config, load_tables
from vpeft.bench.gpu import summed
from vpeft.bench.kept import kept, list_kept
from vpeft.bench.measure import bench, measure
from vpeft.bench.memory import saved_bytes
from vpeft.bench.rows import make_rows, twin
from vpeft.cli import main
from vpeft.tasks.labels import LabelStep
from vpeft.tasks.protocol import TaskModel

ROWS = "[{name: lora, options: {rank: 2}}, {name: adaptformer, label: wide, options: {bottleneck: 8}}]"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_table(ROWS, output=tmp_path / "out", rounds=2))
    return path


def test_writes_table_numbers_and_picture(file, tmp_path, capsys):
    results = bench(file)
    assert [r.label for r in results] == ["full", "frozen", "limit", "lora", "wide"]
    by_label = {r.label: r for r in results}
    assert by_label["lora"].parameters == 3 * 2 * 2 * (32 + 32)  # blocks, q and v, rank
    assert by_label["full"].parameters == sum(
        p.numel() for n, p in timm.create_model("vit_tiny_patch16_224", **SMALL).named_parameters() if "head" not in n
    )
    assert by_label["frozen"].step is None
    assert by_label["limit"].parameters == 0
    assert by_label["lora"].merged is not None
    assert by_label["wide"].merged is None
    assert by_label["full"].ratios["step/full"] == by_label["limit"].ratios["saved/limit"] == 1
    assert by_label["lora"].ratios["saved/full"] == by_label["lora"].saved / by_label["full"].saved
    assert all(r.peak is None for r in results)
    printed = capsys.readouterr().out.splitlines()
    assert next(line.split()[1] for line in printed if line.startswith("lora ")) == "768"
    assert printed[-1] == f"all columns: {tmp_path / 'out' / 'tiny.md'}"
    assert "| lora | 768 |" in (tmp_path / "out" / "tiny.md").read_text()
    with open(tmp_path / "out" / "tiny.csv") as stream:
        table = list(csv.DictReader(stream))
    assert int(table[3]["saved_bytes"]) == by_label["lora"].saved
    assert table[1]["step_s"] == ""
    assert (tmp_path / "out" / "tiny.md").read_text().startswith("vit_tiny_patch16_224, batch 2, fp32, CPU, 1 thread(s)")
    assert (tmp_path / "out" / "tiny.png").stat().st_size > 5000


def test_saved_bytes_of_the_limit(file):
    rows, _ = make_rows(load_bench_config(file))
    limit, width, tokens, heads = rows[2], 32, 2 * 17, 2
    # Both norms' inputs and statistics, q, k and v, the attention's output and its log-sums, the MLP's 4 D.
    block = tokens * (2 * (width + 2) + 4 * width + heads + 4 * width)
    end = tokens * (width + 2) + 2 * 5 + 1  # the final norm, log-probabilities, the weight sum of the loss
    assert saved_bytes(limit) == 4 * (3 * block + end) + 8 * 2  # labels


def test_what_is_kept_has_names_and_makes_up_the_sum(file, capsys):
    rows, _ = make_rows(load_bench_config(file))
    for row in (rows[0], rows[2], rows[3]):
        found = kept(row)
        assert sum(k.bytes for k in found) == saved_bytes(row)
        assert all(k.operations and k.lines for k in found)
    mlp = next(k for k in kept(rows[2]) if k.shape == (2, 17, 128))
    assert (mlp.number, mlp.bytes) == (3, 3 * 4 * 2 * 17 * 128)
    assert mlp.operations == ("GeluBackward0",)
    assert mlp.lines[0].startswith("mlp.py:")
    main(["bench-kept", "--cfg", str(file), "--rows", "wide", "--set", "batch_size=1"])
    page = capsys.readouterr().out
    assert page.count("## ") == 2
    assert "| 3 | 1 x 17 x 128 | GeluBackward0 | mlp.py:" in page


def test_what_is_kept_of_many_rows_and_tables(file, tmp_path, monkeypatch):
    """One method that the model refuses does not end the list; tables are told apart; a label that is nowhere is refused."""
    monkeypatch.setattr(bench_rows, "list_methods", lambda: ["fish", "bitfit"])
    page = list_kept(file, ["all_methods=true", "num_classes=40"], least=0.5)
    titles = [line.partition(":")[0] for line in page.splitlines() if line.startswith("## ")]
    assert titles == ["## full", "## limit", "## lora", "## wide", "## fish", "## bitfit"]
    assert "## fish: left out: fish.ratio: " in page
    (tmp_path / "other.yaml").write_text("base: tiny.yaml\nname: other\nrows: [{name: linear}]\n")
    (tmp_path / "both.yaml").write_text("name: both\ntables: [tiny.yaml, other.yaml]\n")
    page = list_kept(tmp_path / "both.yaml", rows=["linear", "wide"], least=0.5)
    titles = [line.partition(":")[0] for line in page.splitlines() if line.startswith("## ")]
    assert titles == ["## tiny, limit", "## tiny, wide", "## other, limit", "## other, linear"]
    for asked, message in ((["wyde"], "no row 'wyde' is trained; did you mean 'wide'"), (["frozen"], "no row 'frozen'")):
        with pytest.raises(vpeft.ConfigError, match=message):
            list_kept(file, rows=asked)
    with pytest.raises(vpeft.ConfigError, match="--least: -1 is impossible"):
        list_kept(file, least=-1)


def test_what_is_counted_is_freed(file):
    """A result that its own operation keeps, as a sigmoid's is, lives on where the hook gives back the very tensor."""
    config = load_bench_config(file)
    rows, _ = make_rows(config)
    kept = []

    def squash(module, args, output):
        output = output.sigmoid()
        kept.append(output.untyped_storage()._weak_ref())
        return output

    rows[0].model.blocks[0].register_forward_hook(squash)
    assert saved_bytes(rows[0]) > 0
    assert kept
    assert all(torch.UntypedStorage._expired(ref) for ref in kept)


def test_steps_move_no_weight_and_rows_share_their_memory(file):
    config = load_bench_config(file)
    rows, _ = make_rows(config)
    full, lora = rows[0], rows[3]
    a, b = (dict(r.model.named_parameters())["blocks.0.attn.qkv.weight"] for r in (full, lora))
    assert a is not b
    assert a.data_ptr() == b.data_ptr()
    assert a.requires_grad
    assert not b.requires_grad
    before = {n: p.detach().clone() for r in rows for n, p in r.model.named_parameters()}
    for row in rows:
        if row.trains:
            row.training()
            row.step()
            assert all(p.grad is None for p in row.model.parameters())
    assert all(torch.equal(p, before[n]) for r in rows for n, p in r.model.named_parameters())


def test_merged_rows_leave_the_others_as_they_were(file):
    config = load_bench_config(file)
    rows, batch = make_rows(config)
    outputs = [r.forward() for r in rows]
    lora = rows[3]
    with torch.no_grad():
        for p in lora.handle.parameters():
            p.add_(0.1)
    changed = lora.forward()
    merged = bench_rows.merged_forward(lora)()
    assert torch.allclose(merged, changed, atol=1e-5)
    lora.handle.unmerge()
    assert all(torch.equal(r.forward(), y) for r, y in zip(rows, outputs, strict=True) if r is not lora)
    assert batch.images.shape == (2, 3, 32, 32)


def test_twin_shares_memory_and_nothing_else():
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    copy = twin(TaskModel(model, model, LabelStep(3))).backbone
    for a, b in zip(model.parameters(), copy.parameters(), strict=True):
        assert a is not b
        assert a.data_ptr() == b.data_ptr()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batchsize=4", r"batchsize: unknown key; did you mean 'batch_size'"),
        ("model.nam=x", r"model\.nam: unknown key; did you mean 'name'"),
        ("rows=[{nme: lora}]", r"rows\[0\]\.nme: unknown key; did you mean 'name'"),
        ("rows=[]", r"rows: nothing to measure"),
        ("rounds=0", r"rounds: 0 is impossible"),
        ("clock=cup", r"clock: 'cup' is not one of wall, cpu; did you mean 'cpu'"),
        ("device=gpu9", r"device: 'gpu9' is none of torch's devices"),
        ("precision=fp16", r"precision: fp16 needs a GPU"),
        ("model.name=vit_smal_patch16_224", r"model\.name: timm has no .*did you mean 'vit_small_patch16_224'"),
    ],
)
def test_refused_while_reading(file, override, message):
    with pytest.raises(vpeft.ConfigError, match=message):
        load_bench_config(file, [override])


def test_lists_among_the_models_keywords(file):
    """timm's Swin takes lists of its own kind only, not a configuration's."""
    small = "{img_size: 48, patch_size: 4, window_size: 4, embed_dim: 16, depths: [2, 2], num_heads: [2, 4]}"
    config = load_bench_config(file, ["model.name=swin_tiny_patch4_window7_224"])
    config.model.kwargs = OmegaConf.create(small)
    base, batch = bench_rows.classifier(config)
    assert base.model(batch.images).shape == (2, 5)


def test_processor_time_needs_one_thread(file):
    load_bench_config(file, ["clock=cpu"])
    with pytest.raises(vpeft.ConfigError, match="clock: processor time"):
        load_bench_config(file, ["clock=cpu", "threads=2"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("[{name: lorra}]", r"rows: unknown method 'lorra'; did you mean 'lora'"),
        ("[{name: lora, options: {ranks: 2}}]", r"rows: lora has no hyper-parameter 'ranks'"),
        ("[{name: lora}, {name: lora}]", r"rows: two are called 'lora'; give one of them another label"),
        ("[{name: full}]", r"rows: two are called 'full'"),
        ("[{name: huggingface_lora, options: {r: 2}}]", r"rows: huggingface_lora has no option 'r'"),
    ],
)
def test_refused_before_a_model_is_built(file, rows, message, monkeypatch):
    monkeypatch.setattr("timm.create_model", lambda *a, **k: pytest.fail("a model was built"))
    monkeypatch.setattr(bench_rows, "peft_installed", lambda: True)
    with pytest.raises(vpeft.ConfigError, match=message):
        measure(load_bench_config(file, [f"rows={rows}"]))


def test_row_of_huggingface(file, monkeypatch):
    """With a stand-in for the library, which need not be installed."""
    monkeypatch.setitem(sys.modules, "peft", None)
    config = load_bench_config(file, ["rows=[{name: huggingface_lora, options: {rank: 3}}]"])
    with pytest.raises(vpeft.ConfigError, match="needs huggingface's peft"):
        make_rows(config)
    asked = {}

    def get_peft_model(model, settings):
        asked.update(settings)
        model.requires_grad_(False)
        model.blocks[0].lora_a = torch.nn.Parameter(torch.zeros(7))
        model.head.requires_grad_(True)
        return model

    fake = types.SimpleNamespace(LoraConfig=lambda **k: k, get_peft_model=get_peft_model)
    monkeypatch.setitem(sys.modules, "peft", fake)
    row = make_rows(config)[0][-1]
    row.training()
    row.step()
    assert row.parameters == 7
    assert asked == {"r": 3, "lora_alpha": 8.0, "target_modules": ["qkv"], "modules_to_save": ["head"]}


@pytest.mark.slow
def test_stored_features_and_their_step(file):
    """Where something frozen lies below, a step is also measured from stored features; elsewhere it is not."""
    config = load_bench_config(
        file, ["rows=[{name: linear}, {name: lora}, {name: lora, label: upper, options: {blocks: '2'}}]"]
    )
    results = {r.label: r for r in measure(config)}
    for label in ("linear", "upper"):
        assert results[label].cached > 0
        assert results[label].ratios["cached/step"] > 0
    assert results["lora"].cached is None
    assert "cached/step" not in results["lora"].ratios
    called: list[int] = []
    rows = {r.label: r for r in make_rows(config)[0]}
    for label, expected in (("linear", []), ("upper", [2])):
        for index, block in enumerate(rows[label].model.blocks):
            block.attn.register_forward_hook(lambda *_, index=index: called.append(index))
        step = rows[label].cached()
        called.clear()
        step()
        assert called == expected, "what lies below is not computed again"


def test_an_experiments_own_model_and_loss(tmp_path):
    """Segmentation: the decode head is in the step, its parameters are not counted as the method's."""
    from vpeft.bench.measure import bench

    table = segmentation_table(
        tmp_path,
        "head: fcn, options: {channels: 8}",
        "[{name: lora, options: {rank: 2}}]",
        size=32,
        depth=2,
        more="rounds: 2\n",
    )
    results = {r.label: r for r in bench(table)}
    assert results["lora"].parameters == 2 * 2 * (2 * (32 + 32))
    assert results["limit"].parameters == 0
    assert 0 < results["limit"].saved < results["full"].saved
    assert results["lora"].step > 0
    assert results["lora"].cached is None
    assert "vit_tiny_patch16_224, seg, batch 2, fp32" in next(tmp_path.rglob("*.md")).read_text(), "whose figures they are"


@pytest.mark.slow
def test_several_tables_by_one_command(tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(tiny_table(ROWS, name=name, output="elsewhere", rounds=2))
    (tmp_path / "all.yaml").write_text("name: all\ntables: [one.yaml, two.yaml]\n")
    out = tmp_path / "out"
    results = bench(tmp_path / "all.yaml", [f"output={out}", "rounds=1"])
    assert [r.label for r in results] == 2 * ["full", "frozen", "limit", "lora", "wide"]
    assert sorted(p.name for p in out.iterdir()) == [
        "all.md",
        *(f"{n}.{e}" for n in ("one", "two") for e in ("csv", "md", "png")),
    ]
    whole = (out / "all.md").read_text()
    assert whole == (out / "one.md").read_text() + "\n" + (out / "two.md").read_text()
    assert "medians of 1 interleaved rounds" in whole
    (tmp_path / "all.yaml").write_text("name: all\ntables: [one.yaml, one.yaml]\n")
    with pytest.raises(vpeft.ConfigError, match="two are called 'one'"):
        bench(tmp_path / "all.yaml", [])
    (tmp_path / "all.yaml").write_text("name: all\ntables: [nothing.yaml]\n")
    with pytest.raises(vpeft.ConfigError, match=r"nothing\.yaml"):
        bench(tmp_path / "all.yaml", [])


def test_kernels_are_the_devices_events():
    def event(kind, count, took):
        return types.SimpleNamespace(device_type=types.SimpleNamespace(name=kind), count=count, self_device_time_total=took)

    number, seconds = summed([event("CUDA", 3, 1500.0), event("CPU", 100, 0.0), event("CUDA", 4, 500.0)])
    assert number == 7
    assert seconds == pytest.approx(2e-3)


def test_the_gpu_command_is_complete():
    """Every table of configs/bench/gpu.yaml is there; only the device is missing here."""
    folder = Path(__file__).parents[2] / "configs" / "bench"
    found = load_tables(folder / "gpu.yaml", ["device=cpu", "precision=fp32"])
    assert [(c.name, c.compile, c.batch_size) for c in found] == [
        ("vit_b16_gpu", False, 64), ("vit_b16_gpu_compiled", True, 64), ("swin_b_gpu", False, 64), ("vit_l14_gpu", False, 64),
    ]  # fmt: skip
    assert all(c.device == "cpu" for c in found)
