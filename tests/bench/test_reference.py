"""Kept ratios: what moved is said, and only what can be judged here is."""

import json
from pathlib import Path

import pytest

import vpeft
from tests.support.bench import tiny_table
from vpeft.bench import reference
from vpeft.bench.config import load_tables
from vpeft.bench.reference import LEAST_NOISE, check_reference, read_reference, write_reference
from vpeft.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    path = tmp_path_factory.mktemp("cfg") / "tiny.yaml"
    path.write_text(tiny_table("[{name: lora, options: {rank: 2}}]"))
    return path


@pytest.fixture(scope="module")
def written(cfg, tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "reference.json"
    write_reference(path, cfg, repeats=2)
    return path.read_text()


@pytest.fixture
def file(written, tmp_path):
    """A reference, whose times may be off by anything."""
    path = tmp_path / "reference.json"
    path.write_text(written)
    stored = json.loads(path.read_text())
    for ratios in stored["tables"]["tiny"]["rows"].values():
        for key, ratio in ratios.items():
            ratio["noise"] = ratio["noise"] if key.startswith("saved") else 1e9
    path.write_text(json.dumps(stored))
    return path


def changed(path, change):
    stored = json.loads(path.read_text())
    change(stored["tables"]["tiny"]["rows"]["lora"])
    path.write_text(json.dumps(stored))
    return path


@pytest.mark.slow
def test_what_is_kept(cfg, tmp_path, monkeypatch, capsys):
    steps = iter([1.10, 1.20, 1.15])
    measured = reference.measure

    def measure(config):
        results = measured(config)
        results[3].ratios |= {"step/limit": next(steps), "step/full": 0.75, "saved/limit": 1.5}
        return results

    monkeypatch.setattr(reference, "measure", measure)
    write_reference(tmp_path / "new" / "r.json", cfg, ["rounds=2"])
    stored = read_reference(tmp_path / "new" / "r.json")
    row = stored["tables"]["tiny"]["rows"]["lora"]
    assert row["step/limit"] == {"median": 1.15, "spread": 0.087, "noise": 0.1739}
    assert row["step/full"] == {"median": 0.75, "spread": 0.0, "noise": LEAST_NOISE}
    assert row["saved/limit"] == {"median": 1.5, "spread": 0.0, "noise": 0.01}
    assert stored["tables"]["tiny"]["config"]["rounds"] == 2
    assert stored["machine"]["versions"].keys() == {"torch", "timm", "vpeft"}
    assert stored["machine"]["threads"] == 1
    assert stored["machine"]["processor"]
    told = capsys.readouterr()
    assert "4 rows, each the median of 3 measurements" in told.out
    assert [line.partition("]")[0] for line in told.err.splitlines()] == ["[1/3", "[2/3", "[3/3"]


@pytest.mark.slow
def test_nothing_moved(file, capsys):
    assert check_reference(file) == []
    out = capsys.readouterr().out
    assert "No row moved." in out
    assert "only memory is judged" not in out
    main(["bench", "--check", str(file)])


@pytest.mark.parametrize(
    ("key", "factor", "moved"),
    [
        pytest.param("saved/limit", 1.02, "smaller", marks=pytest.mark.slow),
        pytest.param("saved/limit", 0.98, "larger", marks=pytest.mark.slow),
        pytest.param("saved/full", 1.005, None, marks=pytest.mark.slow),
        pytest.param("step/limit", 10.0, "smaller", marks=pytest.mark.slow),
    ],
)
def test_a_row_that_moved(file, key, factor, moved, capsys):
    changed(file, lambda row: row[key].update(median=row[key]["median"] * factor))
    if key == "step/limit":
        changed(file, lambda row: row[key].update(noise=0.5))
    if moved is None:
        main(["bench", "--check", str(file)])
        assert "No row moved." in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--check", str(file)])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "1 rows moved: tiny: lora" in out
    (line,) = [x for x in out.splitlines() if f"| lora | {key} |" in x]
    assert f"**{moved} by" in line


def test_rows_that_are_gone_and_new_ones(file, capsys):
    stored = json.loads(file.read_text())
    rows = stored["tables"]["tiny"]["rows"]
    rows["former"] = rows.pop("lora")
    file.write_text(json.dumps(stored))
    assert {c.row for c in check_reference(file)} == {"former"}
    out = capsys.readouterr().out
    assert "| former | saved/limit |" in out
    assert "| gone |" in out
    assert "| new |" in out


@pytest.mark.slow
def test_on_another_processor_memory_alone_is_judged(file, capsys):
    stored = json.loads(file.read_text())
    stored["machine"]["processor"] = "Another one"
    stored["machine"]["versions"]["timm"] = "0.9"
    row = stored["tables"]["tiny"]["rows"]["lora"]
    row["step/limit"].update(median=100.0, noise=0.03)
    file.write_text(json.dumps(stored))
    assert check_reference(file) == []
    out = capsys.readouterr().out
    assert "the reference on Another one, 1 thread(s): only memory is judged, times are shown." in out
    assert "and was 0.9." in out
    assert "| not judged |" in out
    row["saved/limit"]["median"] *= 2
    file.write_text(json.dumps(stored))
    assert [c.ratio for c in check_reference(file)] == ["saved/limit"]


def test_a_method_that_grows_is_seen(file, monkeypatch):
    """What the guard is for: another tensor kept for backward."""
    from vpeft.bench import rows

    loss = rows.MethodRow.loss

    def larger(row):
        if row.label == "lora":
            kept = row.batch.images.clone().requires_grad_()
            return loss(row) + 0 * (kept * kept).sum()
        return loss(row)

    monkeypatch.setattr(rows.MethodRow, "loss", larger)
    assert {c.ratio for c in check_reference(file)} == {"saved/limit", "saved/full"}


def test_small_ratios_do_not_move_by_their_digits():
    """A head alone keeps 0.0013 of what the limit does: with four digits behind the point 0.00134 was 3 % off."""
    for value in (0.00134, 0.00002, 0.0):
        runs = [{"linear": {"saved/limit": value, "step/limit": 0.5}}] * 2
        compared = {c.ratio: c for c in reference._compared("tiny", reference._summed(runs), runs[0], True)}
        assert not compared["saved/limit"].moved
        assert "as before" in str(compared["saved/limit"])
    grown = reference._compared("tiny", reference._summed(runs), {"linear": {"saved/limit": 0.1, "step/limit": 0.5}}, True)
    assert [c.ratio for c in grown if c.moved] == ["saved/limit"]
    assert "0.00134" in str(reference.Compared("tiny", "linear", "saved/limit", 0.00134, 0.00134, 0.01, True))


def test_where_nothing_can_be_written_nothing_is_measured(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "measure", lambda config: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "reference.json", tmp_path):
        with pytest.raises(vpeft.VpeftError, match="cannot be written: "):
            write_reference(place, cfg)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON: "),
        ("[1]", "is no reference of format 1; vpeft bench --write-reference makes one"),
        ('{"format": 2}', "is no reference of format 1"),
    ],
)
def test_refused_files(tmp_path, text, message):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(vpeft.VpeftError, match=message):
        check_reference(path)


def test_refused(file, cfg, tmp_path):
    with pytest.raises(vpeft.ConfigError, match=r"does not exist; vpeft bench --write-reference"):
        check_reference(tmp_path / "none.json")
    with pytest.raises(vpeft.ConfigError, match=r"--check measures with the settings in .*; leave out rounds=3"):
        check_reference(file, ["rounds=3"])
    with pytest.raises(vpeft.ConfigError, match="--repeats: 0 is impossible"):
        write_reference(tmp_path / "x.json", cfg, repeats=0)
    stored = json.loads(file.read_text())
    stored["tables"]["tiny"]["config"]["round"] = 3
    file.write_text(json.dumps(stored))
    with pytest.raises(vpeft.ConfigError, match="the settings of tiny: "):
        check_reference(file)


def test_its_settings_are_there():
    assert [c.name for c in load_tables(ROOT / "configs" / "bench" / "reference.yaml")] == [
        "reference_vit",
        "reference_swin",
    ]


@pytest.mark.slow
def test_kept_references_hold():
    moved = {
        file.name: [str(c) for c in check_reference(file)] for file in (ROOT / "docs" / "bench").glob("reference*.json")
    }
    assert not any(moved.values()), moved
