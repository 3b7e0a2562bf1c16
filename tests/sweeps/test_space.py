"""What may be chosen: lists and ranges, grids, and entries that are refused."""

import optuna
import pytest
from omegaconf import OmegaConf

import vpeft
from tests.support.places import ROOT
from vpeft.sweeps.space import as_overrides, load_space

WHOLE = """
trials: 7
space:
  optim.lr: {low: 1.0e-4, high: 1.0e-1, log: true}
  method.options.rank: {low: 1, high: 8, int: true}
  method.options.targets: [[q, v], [q, k, v]]
  model.drop_path: [0, 0.1]
  method.options.bias: [true, false, null, none]
"""


def test_a_space_suggests_what_it_says(space):
    found = load_space(space(WHOLE))
    assert found.trials == 7
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    seen = [(found.suggest(t), t) for t in (study.ask() for _ in range(40))]
    rates = [s["optim.lr"] for s, _ in seen]
    assert 1e-4 <= min(rates) < 1e-3 < 1e-2 < max(rates) <= 1e-1
    assert {s["method.options.rank"] for s, _ in seen} == set(range(1, 9))
    assert all(type(s["method.options.rank"]) is int for s, _ in seen)
    assert {tuple(s["method.options.targets"]) for s, _ in seen} == {("q", "v"), ("q", "k", "v")}
    assert {s["method.options.bias"] for s, _ in seen} == {True, False, None, "none"}
    assert all(found.settings(t.params) == s for s, t in seen), "what is read back is what was tried"


def test_settings_come_through_the_command_line_as_they_are(tmp_path):
    from omegaconf import DictConfig

    for value in (1e-5, 3, True, None, "none", "1", [1, 2], {"a": 0.5}, "8-11", "0,4"):
        (text,) = as_overrides({"a.b": value})
        found = OmegaConf.from_dotlist([text]).a.b
        plain = OmegaConf.to_container(found) if not isinstance(found, str | int | float | None) else found
        assert (plain, type(plain)) == (value, type(value)), text
        assert not isinstance(plain, DictConfig)


def test_a_grid_has_every_combination_once(space):
    grid = load_space(space("sampler: grid\nspace: {optim.lr: [1, 2, 3], optim.weight_decay: [0, 0.1]}"))
    assert grid.trials == len({tuple(g.items()) for g in grid.grid()}) == 6
    assert load_space(space("space: {optim.lr: [1, 2]}")).trials == 30


REFUSED = {
    "space: nothing to choose": "trials: 3",
    "trails: unknown key; did you mean 'trials'": "trails: 3",
    "sampler: 'tpo' is not one of tpe, random, grid": "sampler: tpo\nspace: {optim.lr: [1]}",
    "space.optim.lr: a grid needs lists": "sampler: grid\nspace: {optim.lr: {low: 1, high: 2}}",
    "trials: the grid has 4 combinations": "sampler: grid\ntrials: 3\nspace: {optim.lr: [1, 2, 3, 4]}",
    "space.optim.lr: expected numbers low < high, got 2 and 1": "space: {optim.lr: {low: 2, high: 1}}",
    "space.optim.lr: a logarithmic range begins above 0": "space: {optim.lr: {low: 0, high: 1, log: true}}",
    "whole numbers has such ends": "space: {optim.lr: {low: 0.5, high: 1, int: true}}",
    "space.optim.lr.logg: unknown; did you mean 'log'": "space: {optim.lr: {low: 1, high: 2, logg: true}}",
    "log and int are true or false": "space: {optim.lr: {low: 1, high: 2, log: 1}}",
    "space.optim: expected a list of values, or a range": "space: {optim: {lr: [1, 2]}}",
    "space.optim.lr: expected a list of values": "space: {optim.lr: 0.1}",
    r"space.optim.lr: \[\] must have at least one value": "space: {optim.lr: []}",
    "and none twice": "space: {optim.lr: [1, 2, 1]}",
    "space: 'optim lr' is no key": "space: {optim lr: [1, 2]}",
    "space.seed: trials that differ in it cannot be compared": "space: {seed: [0, 1]}",
    "space.data.val_size: trials that differ": "space: {data.val_size: [10, 20]}",
    "space.data.test_split: trials that differ": "space: {data.test_split: [test]}",
    **{
        f"space.{key}: trials that differ in it": f"space: {{{key}: [{values}]}}"
        for key, values in {
            "data.shots": "1, 2",
            "data.list_seed": "0, 1",
            "data.image_root": "a, b",
            "data.also_test": "[], [x]",
            "report": "full, none",
            "tensorboard": "true, false",
            "origin": "a, b",
            "recipe": "a, b",
            "seg.scenes.objects": "[1, 2], [2, 3]",
            "video.motion.turn": "1, 2",
            "video.fold": "1, 2",
        }.items()
    },
    "space.data: trials that differ in data.source cannot": "space: {data: [{source: digits}, {source: pretext}]}",
    "final.seed: the winner's runs have the sweep's own": "space: {optim.lr: [1]}\nfinal: {seed: 4}",
    "final: 'a b' is no key": "space: {optim.lr: [1]}\nfinal: {a b: 4}",
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_space_is_refused(space, message):
    with pytest.raises(vpeft.ConfigError, match=message):
        load_space(space(REFUSED[message]))


@pytest.mark.parametrize("file", sorted((ROOT / "configs/spaces").rglob("*.yaml")), ids=lambda f: f.stem)
def test_shipped_spaces_are_whole(file):
    """Their keys are those of configurations, and their options those of methods."""
    from vpeft.engine.config import Config
    from vpeft.methods import METHODS
    from vpeft.options import declared

    keys = {
        f"{s.name}.{d.name}" for s in declared(Config) if hasattr(s.hint, "__dataclass_fields__") for d in declared(s.hint)
    }
    options = {o.name for m in METHODS.values() for o in declared(m)}
    found = load_space(file)
    for part in found.parts:
        name = part.key.removeprefix("method.options.")
        assert name in options if name != part.key else part.key in keys, part.key


def test_a_space_that_ships_is_found_without_its_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = {tuple(p.key for p in load_space(name).parts) for name in ("rates", "spaces/rates", "configs/spaces/rates.yaml")}
    assert found == {("optim.lr", "optim.weight_decay")}
    with pytest.raises(vpeft.ConfigError, match=r"--space: rate does not exist; did you mean 'spaces/rates'"):
        load_space("rate")
    with pytest.raises(vpeft.ConfigError, match=r"--final 'train\.epochs': expected key\.sub=value"):
        load_space("rates", final=["train.epochs"])
    with pytest.raises(vpeft.ConfigError, match=r"^--final: final\.seed: the winner's runs have the sweep's own"):
        load_space("rates", final=["seed=4"])
    (tmp_path / "rates").mkdir()  # a folder of this name hides none
    assert load_space("rates").parts
    (tmp_path / "mine.yaml").write_text("space: {optim.lr: [1]}")
    with pytest.raises(vpeft.ConfigError, match=r"--space: mime\.yaml does not exist; did you mean 'mine\.yaml'"):
        load_space("mime.yaml")


def test_settings_behind_final_are_of_every_run(monkeypatch):
    """Each ``--final`` takes one; what follows it is an override like those before it."""
    from vpeft import sweeps
    from vpeft.cli import main

    given = []
    monkeypatch.setattr(sweeps, "sweep", lambda *args, **more: given.append((args, more["final"])))
    main(
        [
            "sweep",
            "--cfg",
            "digits/lora",
            "--space",
            "rates",
            "--final",
            "train.epochs=3",
            "--final",
            "train.patience=2",
            "optim.lr=1",
            "--seeds",
            "1",
        ]
    )
    (((_, _, overrides), final),) = given
    assert final == ["train.epochs=3", "train.patience=2"]
    assert "optim.lr=1" in overrides
