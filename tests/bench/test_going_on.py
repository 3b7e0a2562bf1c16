"""What is measured is not lost: not by an interruption between tables, nor by a second start, nor by a dot in a name."""

import pytest

from tests.support.models import SMALL
from vpeft.bench import measure
from vpeft.bench.deadline import Deadline
from vpeft.bench.measure import bench
from vpeft.errors import WriteError

TINY = """
name: {name}
model: {{name: vit_tiny_patch16_224, kwargs: {model}}}
batch_size: 2
num_classes: 5
rounds: 1
warmup: 0
threads: 1
interleave: {interleave}
rows: [{{name: linear}}]
"""


@pytest.fixture
def both(tmp_path):
    """A file of two tables: of rows that come one by one, and of rows that come all together."""
    model = {k: v for k, v in SMALL.items() if k != "num_classes"}
    for name, interleave in (("one.by.one", "one"), ("one.together", "all")):
        (tmp_path / f"{name}.yaml").write_text(TINY.format(name=name, model=model, interleave=interleave))
    file = tmp_path / "both.yaml"
    file.write_text(f"name: both\noutput: {tmp_path / 'out'}\ntables: [one.by.one.yaml, one.together.yaml]\n")
    return file


def names(tmp_path):
    return sorted(p.name for p in (tmp_path / "out").iterdir())


WHOLE = [f"one.{how}.{ending}" for how in ("by.one", "together") for ending in ("csv", "md", "png")]


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
    with pytest.raises(WriteError, match=r"one.by.one.md cannot be written: \S+file is no folder"):
        bench(both, [f"output={tmp_path / 'file'}"])


def test_labels_stay_in_their_column(both, tmp_path, capsys):
    bench(tmp_path / "one.together.yaml", [f"output={tmp_path / 'out'}", r'rows=[{name: linear, label: "a|b\nc"}]'])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert table[-1].startswith("| a\\|b c |")
