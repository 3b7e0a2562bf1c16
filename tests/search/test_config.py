"""What a search's configuration may say, and the experiments that come of it."""

import pytest
from omegaconf import OmegaConf

from vpeft.engine.config import Config
from vpeft.errors import ConfigError
from vpeft.search.config import load_search_config, rules_of, supernet_config, winner_config
from vpeft.search.evolution import Rules

BASE = """
name: some/search
data: {source: digits, train_split: train, test_split: test, val_size: 200}
optim: {lr: 1.0e-2}
train: {epochs: 7, batch_size: 64}
search:
  max_parameters: 5000
  supernet: {optim: {lr: 5.0e-4}, train: {epochs: 30}, model: {drop_path: 0.1}}
  retrain: {optim: {lr: 1.0e-3}}
"""


@pytest.fixture
def read(tmp_path):
    def make(*overrides, text=BASE):
        (tmp_path / "search.yaml").write_text(text)
        return load_search_config(tmp_path / "search.yaml", overrides)

    return make


def test_defaults_are_the_rules(read):
    config = read()
    assert rules_of(config) == Rules()
    assert config.search.algorithm == "evolution"


def test_stages_are_experiments_with_settings_of_their_own(read):
    config = read()
    first, last = supernet_config(config), winner_config(config, None)
    assert OmegaConf.get_type(first) is OmegaConf.get_type(last) is Config
    assert (first.name, last.name) == ("some/search/supernet", "some/search/winner")
    assert (first.optim.lr, first.train.epochs, first.model.drop_path) == (5e-4, 30, 0.1)
    assert (last.optim.lr, last.train.epochs, last.model.drop_path) == (1e-3, 7, 0.0)
    assert "search" not in first


def test_the_first_stage_has_no_test_split_and_chooses_no_epoch(read):
    first, last = supernet_config(read()), winner_config(read(), None)
    assert first.data.test_split is None
    assert first.train.select == "last"
    assert (first.data.val_size, last.data.val_size) == (200, 0)
    assert last.data.test_split == "test"


def test_the_winner_may_be_trained_without_the_validation_samples(read):
    last = winner_config(read("search.retrain_on=train"), None)
    assert (last.data.val_size, last.data.train_split) == (200, "train")


def test_the_supernet_knows_no_test_set(read):
    config = read("data.source=imagenet", "data.root=here", "data.shots=1", "data.also_test=[imagenet-a]")
    stage, last = supernet_config(config), winner_config(config, None)
    assert (stage.data.test_split, list(stage.data.also_test)) == (None, [])
    assert (last.data.test_split, list(last.data.also_test)) == ("test", ["imagenet-a"])


FOLDERS = ("data.source=folder", "data.root=here", "data.val_size=0", "data.train_split=train800", "data.val_split=val200")


def test_a_named_split_holds_both(read):
    last = winner_config(read(*FOLDERS, "search.retrain_split=train800val200"), None)
    assert (last.data.train_split, last.data.val_split, last.data.test_split) == ("train800val200", None, "test")
    last = winner_config(read(*FOLDERS, "search.retrain_on=train"), None)
    assert (last.data.train_split, last.data.val_split) == ("train800", "val200")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["search.popluation=3"], r"search.popluation: unknown key; did you mean 'population'"),
        (["search.population=0"], r"search.population: 0 is impossible; it must be at least 1"),
        (["search.population=many"], r"search.population: "),
        (["search.algorithm=evolve"], r"search.algorithm: 'evolve' is not one of evolution, random"),
        (["search.value_prob=1.5"], r"search.value_prob: 1.5 is impossible"),
        (["search.population=40"], r"search.mutations, search.crossovers: 25 \+ 25 are more than search.population 40"),
        (["data.val_size=0"], r"data.val_size: candidates are scored on validation samples; cut some"),
        (["data.test_split=null"], r"data.test_split: the winner is trained on all other samples"),
        (["init=somewhere"], r"init: each stage of a search starts afresh"),
        (["train.extend=2"], r"train.extend: a search's stages are not extended"),
        (["resume=changed"], r"resume: the settings of a search cannot change on the way"),
        (["train.patience=2"], r"train.patience: the supernet trains to its last epoch"),
        (["search.supernet.optim.lrr=2"], r"search.supernet.optim.lrr: unknown key; did you mean 'lr'"),
        (["search.retrain.optim.lr=-2"], r"optim.lr: -2.* is impossible.*\(in search.retrain or the same key"),
        (["search.retrain.data.val_size=2"], r"search.retrain.data: a stage has no such key of its own"),
        (["search.supernet.model.name=x"], r"search.supernet.model.name: a stage has no such key of its own"),
        (["search.supernet.name=x"], r"search.supernet.name: a stage has no such key of its own"),
        (["search.retrain_split=both"], r"search.retrain_split: only for search.retrain_on=all and a data.val_split"),
        (FOLDERS, r"search.retrain_split: the winner is trained on the samples of data.train_split and data.val_split"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_its_key(read, overrides, message):
    with pytest.raises(ConfigError, match=message):
        read(*overrides)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["data.val_size=0", "data.val_split=test", "search.retrain_on=train"], "data.val_split"),
        (["data.train_split=test"], "data.train_split"),
        ([*FOLDERS, "search.retrain_split=test"], "search.retrain_split"),
        ([*FOLDERS[:-1], "data.val_split=other/../test", "search.retrain_split=both"], "data.val_split"),
        ([*FOLDERS[:-1], "data.val_split=test/sub", "search.retrain_split=both"], "data.val_split"),
        ([*FOLDERS[:-2], "data.train_split=.", "data.val_split=val", "search.retrain_split=both"], "data.train_split"),
    ],
)
def test_the_test_split_under_any_of_its_names_is_refused(read, overrides, key):
    with pytest.raises(ConfigError, match=rf"^{key}: '.*' is the test split, which no stage of a search may see"):
        read(*overrides)


def test_a_link_to_the_test_split_is_refused(read, tmp_path):
    for name in ("train800", "both", "test"):
        (tmp_path / "data" / name).mkdir(parents=True)
    (tmp_path / "data/val200").symlink_to(tmp_path / "data/test")
    with pytest.raises(ConfigError, match=r"^data.val_split: 'val200' is the test split"):
        read(*FOLDERS, f"data.root={tmp_path / 'data'}", "search.retrain_split=both")


def test_the_training_split_is_no_validation_split(read):
    with pytest.raises(ConfigError, match=r"^data.val_split: 'train' is the training split"):
        read("data.val_size=0", "data.val_split=train", "search.retrain_on=train")
