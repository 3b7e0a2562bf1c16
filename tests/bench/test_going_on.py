"""What is measured is not lost: not by an interruption between tables, nor by a second start, nor by a dot in a name."""

import pytest

from tests.support.bench import tiny_table
from vpeft.bench import measure
from vpeft.bench.config import load_bench_config
from vpeft.bench.deadline import Deadline
from vpeft.bench.groups import fill_ratios
from vpeft.bench.measure import bench
from vpeft.bench.report import markdown
from vpeft.bench.result import Result
from vpeft.errors import ConfigError


@pytest.fixture
def both(tmp_path):
    """A file of two tables: of rows that come one by one, and of rows that come all together."""
    for name, interleave in (("one.by.one", "one"), ("one.together", "all")):
        (tmp_path / f"{name}.yaml").write_text(tiny_table("[{name: linear}]", name=name, interleave=interleave))
    file = tmp_path / "both.yaml"
    file.write_text(f"name: both\noutput: {tmp_path / 'out'}\ntables: [one.by.one.yaml, one.together.yaml]\n")
    return file


def names(tmp_path):
    return sorted(p.name for p in (tmp_path / "out").iterdir())


WHOLE = [f"one.{how}.{ending}" for how in ("by.one", "together") for ending in ("csv", "md", "png")]


@pytest.mark.slow
def test_tables_that_were_done_are_kept_after_an_interruption(both, tmp_path, monkeypatch, capsys):
    done, asked = measure.measured, []

    def stopped(config, deadline=None, known=()):
        asked.append(config.name)
        if config.name == "one.together" and asked.count(config.name) == 1:
            raise KeyboardInterrupt
        return done(config, deadline, known)

    monkeypatch.setattr(measure, "measured", stopped)
    with pytest.raises(KeyboardInterrupt):
        bench(both)
    first = (tmp_path / "out" / "one.by.one.csv").read_text()
    capsys.readouterr()
    results = bench(both)
    assert asked == ["one.by.one", "one.together", "one.together"]
    assert "goes on after 4 rows" in capsys.readouterr().err
    assert [r.label for r in results] == 2 * ["full", "frozen", "limit", "linear"]
    assert (tmp_path / "out" / "one.by.one.csv").read_text() == first
    assert names(tmp_path) == ["both.md", *WHOLE]
    assert (tmp_path / "out" / "both.md").read_text().count("| linear |") == 2


@pytest.mark.slow
def test_what_a_budget_left_out_is_measured_by_the_same_command(both, tmp_path, monkeypatch, capsys):
    spent = iter([False, False] + [True] * 100)  # asked before the table, and before its row and the second table
    monkeypatch.setattr(Deadline, "over", lambda self: next(spent))
    bench(both, ["budget_minutes=2"])
    first = (tmp_path / "out" / "one.by.one.csv").read_text()
    told = capsys.readouterr()
    assert "one.together is left out: the budget of 2 minutes" in told.out
    assert "the same command goes on with what the budget left out" in told.err
    monkeypatch.setattr(Deadline, "over", lambda self: False)
    bench(both, ["budget_minutes=9"])
    assert (tmp_path / "out" / "one.by.one.csv").read_text() == first
    assert names(tmp_path) == ["both.md", *WHOLE]


@pytest.mark.slow
def test_a_finished_table_stays_until_the_new_one_is_written(both, tmp_path, monkeypatch):
    one = tmp_path / "one.by.one.yaml"
    bench(one, [f"output={tmp_path / 'out'}"])
    first = (tmp_path / "out" / "one.by.one.csv").read_text()

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measured", stopped)
    with pytest.raises(KeyboardInterrupt):
        bench(one, [f"output={tmp_path / 'out'}"])
    assert (tmp_path / "out" / "one.by.one.csv").read_text() == first


def test_where_nothing_can_be_written_nothing_is_measured(both, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "measured", lambda *args: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be made: .*file is a file"):
        bench(both, [f"output={tmp_path / 'file'}"])
    for name in ("", "../up"):
        with pytest.raises(ConfigError, match=f"name: '{name}' is no name"):
            bench(tmp_path / "one.together.yaml", [f"name='{name}'"])


def test_labels_stay_in_their_column(both, tmp_path):
    config = load_bench_config(tmp_path / "one.together.yaml")
    text = markdown(config, [Result("a|b\nc", 5, 1.0, None, 1.0, None, 7, None, {})])
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert table[-1].startswith("| a\\|b c |")


def test_rows_by_themselves_have_the_ratios_to_references_that_came_later():
    """Full fine-tuning is measured first: its table had no number for it over the limit."""
    full = Result("full", 5, 3.0, None, 1.0, 1.5, 70, None, {"step/full": 1.0})
    frozen = Result("frozen", 0, None, None, 0.5, None, None, None, {"forward/frozen": 1.0})
    limit = Result("limit", 0, 2.0, None, 1.0, None, 40, None, {"step/limit": 1.0, "step/full": 0.7})
    fill_ratios([full, frozen, limit])
    assert full.ratios == {
        "step/full": 1.0, "step/limit": 1.5, "step/frozen": 6.0, "forward/frozen": 2.0, "merged/frozen": 3.0,
        "saved/limit": 1.75, "saved/full": 1.0,
    }  # fmt: skip
    assert frozen.ratios == {"forward/frozen": 1.0}
    assert limit.ratios["step/full"] == 0.7, "of the rounds that both were in, where there are such"


def test_a_model_that_timm_does_not_build_is_told_in_one_line(both, tmp_path):
    for wrong in ("depth=abc", "nonsense=1"):
        with pytest.raises(ConfigError, match=r"model.kwargs: timm does not build 'vit_tiny_patch16_224': TypeError"):
            bench(tmp_path / "one.together.yaml", [f"output={tmp_path / 'out'}", f"model.kwargs.{wrong}"])
    with pytest.raises(ConfigError, match=r"model.checkpoint: nowhere.safetensors does not exist"):
        bench(tmp_path / "one.together.yaml", ["model.checkpoint=nowhere.safetensors"])
    with pytest.raises(ConfigError, match=r"model.pretrained: false leaves model.checkpoint unread"):
        bench(tmp_path / "one.together.yaml", [f"model.checkpoint={both}"])
