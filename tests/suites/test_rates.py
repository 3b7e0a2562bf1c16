"""Default learning rates: chosen on one half of the tasks, judged on the other."""

import pytest

from vpeft.engine.lock import RunLock
from vpeft.errors import ConfigError
from vpeft.suites.offline import recipes, settings_of
from vpeft.suites.rates import RateResult, default_rate, distance, grid, page, rate_jobs, read_rates, tune

SMALL = ("train.epochs=1", "data.num_samples=16", "train.precision=fp32", "schedule.warmup_epochs=0")


def rate(task, lr, val, test=0.0, entry="lora"):
    return RateResult("vit", task, entry, lr, val, test, "x")


def test_jobs_learn_from_800_and_are_validated_on_200():
    jobs = rate_jobs("vit", ["full", "knn"], ["digits"])
    assert [key[3] for key in jobs] == recipes()["rates_of"]["full"]
    config = next(iter(jobs.values())).config()
    assert (config.data.train_split, config.data.val_split, config.data.test_split) == ("train800", "val200", "test")
    assert config.optim.lr == grid("full")[0]
    assert len({planned.name for planned in jobs.values()}) == len(jobs)


def test_the_default_is_chosen_on_validation_data_alone():
    results = [
        rate("a", 0.1, 60, 10), rate("a", 0.2, 50, 99), rate("b", 0.1, 60, 20), rate("b", 0.2, 65, 30),
        rate("c", 0.1, 40, 80), rate("c", 0.2, 41, 70), rate("a", 0.4, 99),
    ]  # fmt: skip
    assert default_rate(results, ["a", "b"]) == 0.1
    assert default_rate(results, ["c"]) == 0.2
    assert default_rate([*results, rate("c", 0.05, 40.6)], ["c"]) == 0.05, "half a point tells nothing apart"
    sixths = [rate(t, lr, val) for t in "defghi" for lr, val in ((1, 66 + 1 / 3), (2, 66 + 5 / 6))]
    assert default_rate(sixths, "defghi") == 1, "nor where sums are not exact"
    assert default_rate(results, ["a", "z"]) is None
    assert distance(results, 0.1, ["c", "z"]) == {"c": (80, 70)}


def test_the_page_says_how_far_a_default_is():
    chosen = recipes()["chosen_on"]
    results = [rate(t, lr, val) for t in chosen for lr, val in ((1e-3, 50), (1e-2, 60))]
    results += [rate("digits", 1e-2, 70, 71.5), rate("digits", 1e-3, 75, 74.0), rate("defects", 1e-2, 50, 52.5)]
    results += [rate("digits", 1e-2, 70, 71.5, entry="ssf")]
    assert "| vit | lora | 0.01 | no | 60.00 | 62.00 | 63.25 | +1.25 | 2 |" in page(results)
    assert "| ssf" not in page(results)
    assert page(results).endswith("scale yet: ssf (vit).\n")
    assert " yet" not in page(results[:-1])
    unjudged = [r for r in results if r.task in chosen]
    assert "| vit | lora | 0.01 | no | 60.00 | – | – | – | 0 |" in page(unjudged)


def test_results_are_kept_and_done_once(tmp_path, capsys):
    settings = (*SMALL, f"output={tmp_path / 'runs'}", "train.batch_size=8")
    tune("vit", ["norm"], ["digits"], tmp_path, overrides=settings)
    found = read_rates(tmp_path / "rates.csv")
    assert sorted(key[3] for key in found) == grid("norm")
    jobs = rate_jobs("vit", ["norm"], ["digits"], settings)
    assert {key: r.settings for key, r in found.items()} == {key: settings_of(planned) for key, planned in jobs.items()}
    capsys.readouterr()
    tune("vit", ["norm"], ["digits"], tmp_path, overrides=settings)
    assert "4 runs, 4 of them in" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="4 results of other settings"):
        tune("vit", ["norm"], ["digits"], tmp_path, overrides=(*settings, "train.epochs=2"))
    lock = RunLock(tmp_path)
    lock.take()  # two at once would each write their own rows over the other's
    with pytest.raises(ConfigError, match="another --out"):
        tune("vit", ["norm"], ["digits"], tmp_path, overrides=settings)
    lock.release()
    (tmp_path / "rates.csv").write_text("backbone,task\nvit,digits\n")
    with pytest.raises(ConfigError, match="line 2: no row of this table"):
        read_rates(tmp_path / "rates.csv")


@pytest.mark.parametrize(
    "item", ["optim.lr=0.1", "optim={lr: 0.1}", "data.val_split=test", "data.train_split=train800val200"]
)
def test_what_rates_set_themselves_is_refused(tmp_path, item):
    """A rate would be another than its column says, or be chosen on images that were learned."""
    with pytest.raises(ConfigError, match=r"--rates sets \S+ itself; leave it out"):
        tune("vit", ["norm"], ["digits"], tmp_path / "out", overrides=[item])
    with pytest.raises(ConfigError, match="--rates: knn, linear take no steps"):
        tune("vit", ["knn", "linear"], ["digits"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
