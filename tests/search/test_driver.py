"""A whole search: what it writes, what it may see, and that it goes on after any interruption as if there was none."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import vpeft
from tests.engine.conftest import TINY as PLAIN
from tests.search.conftest import TINY
from tests.support.places import ROOT
from vpeft import checkpoint
from vpeft.data.embedded import ArrayDataset
from vpeft.engine.config import load_config
from vpeft.engine.lock import RunLock
from vpeft.engine.run import RunFolder
from vpeft.engine.settings import stored_config
from vpeft.engine.train import check, train
from vpeft.errors import ConfigError, VpeftError
from vpeft.search import driver
from vpeft.search.config import load_search_config, supernet_config
from vpeft.search.driver import search
from vpeft.search.folder import PICTURES
from vpeft.search.journal import Journal, read_rows
from vpeft.tasks.classification.data import _open


class KilledHere(BaseException):
    """In the place of kill -9, which tests/search/test_killed.py sends."""


def folder_of(config) -> Path:
    return Path(config.output) / config.name


def told(folder):
    """All that a search found, without times."""
    result = json.loads((folder / "search.json").read_text())
    result.pop("seconds")
    rows = {f: [{k: v for k, v in r.items() if k != "seconds"} for r in read_rows(folder / f"{f}.jsonl")]
            for f in ("search", "random")}  # fmt: skip
    return result, rows, {n: load_file(folder / n / "best.safetensors") for n in ("supernet", "winner")}


def same(one, other):
    assert one[:2] == other[:2]
    for name, tensors in one[2].items():
        assert tensors.keys() == other[2][name].keys()
        assert all(torch.equal(t, other[2][name][k]) for k, t in tensors.items()), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A search without interruption."""
    path = tmp_path_factory.mktemp("whole")
    (path / "tiny.yaml").write_text(TINY + f"output: {path / 'runs'}\n")
    config = load_search_config(path / "tiny.yaml", ["name=whole"])
    return config, search(config)


def test_the_result_is_an_ordinary_checkpoint_of_the_size_that_was_counted(whole):
    config, result = whole
    folder = folder_of(config)
    assert json.loads((folder / "search.json").read_text()) == result
    file = checkpoint.read(folder / result["checkpoint"])
    own = sum(t.numel() for n, t in file.tensors.items() if n not in file.head_names)
    assert own == result["parameters"] <= 420
    parts = {p["method"]: p for p in file.metadata["method"]["options"]["parts"]}
    assert parts["lora"]["rank"] == result["architecture"]["lora"]
    assert parts["adapter"]["bottleneck"] == result["architecture"]["adapter"]
    assert all((folder / name).stat().st_size > 5000 for name in PICTURES)
    assert not (folder / "lock.json").exists()


def test_selection_scores_are_in_the_journal_and_nowhere_else(whole):
    config, result = whole
    folder = folder_of(config)
    rows = read_rows(folder / "search.jsonl")
    best = max(rows, key=lambda r: (r["selection_score"], -r["parameters"]))
    assert best["architecture"] == result["architecture"]
    assert len(rows) == result["evaluations"] == len(read_rows(folder / "random.jsonl"))
    assert not [k for r in (result, result["random"]) for k in r if "val" in k and k != "value_prob" and k != "evaluations"]
    metrics = json.loads((folder / "winner/metrics.json").read_text())
    assert not [k for k in metrics if k.startswith("val_")]
    assert metrics["test_top1"] == result["test_top1"]
    assert str(best["selection_score"]) not in (folder / "search.json").read_text()


def test_stages_train_on_what_they_may(whole):
    config, _ = whole
    stages = {n: stored_config(folder_of(config) / n) for n in ("supernet", "winner")}
    assert (stages["supernet"].data.val_size, stages["supernet"].data.test_split) == (40, None)
    assert (stages["winner"].data.val_size, stages["winner"].data.test_split) == (0, "test")
    assert "test_top1" not in json.loads((folder_of(config) / "supernet/metrics.json").read_text())


@pytest.mark.slow
def test_no_image_of_the_test_split_is_read_before_the_winner_is_trained(tiny, monkeypatch):
    """Every read of a test image finds the winner's last epoch done; each is read once for each winner."""
    config = tiny(
        "search.compare_random=false", "data.num_samples=null", "data.val_size=900", "train.epochs=1", "search.generations=0"
    )
    tests, reads = set(), []

    def opening(data, split, *others, **named):
        dataset = _open(data, split, *others, **named)
        if split == "test":
            tests.add(id(dataset.images))
        return dataset

    real = ArrayDataset.__getitem__

    def reading(self, index):
        if id(self.images) in tests:
            log = folder_of(config) / "winner/log.jsonl"
            reads.append(len(log.read_text().splitlines()) if log.exists() else 0)
        return real(self, index)

    monkeypatch.setattr("vpeft.tasks.classification.data._open", opening)
    monkeypatch.setattr(ArrayDataset, "__getitem__", reading)
    search(config)
    assert reads == [1] * 797


def crash(config, monkeypatch, owner, name, calls):
    """Run a search; the call with this number is the last thing that happens in it."""
    real, count = getattr(owner, name), [0]

    def call(*args, **kwargs):
        found = real(*args, **kwargs)
        count[0] += 1
        if count[0] == calls:
            raise KilledHere
        return found

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, call)
        with pytest.raises(KilledHere):
            search(config)


CRASHES = [
    (RunFolder, "keep", 1),  # after the supernet's first epoch
    (driver, "survey", 1),  # before anything is locked
    (Journal, "add", 1),
    (Journal, "add", 6),
    (Journal, "add", 9),  # in the random search
    (RunFolder, "keep", 1),  # after the winner's first epoch
    (RunFolder, "finish", 1),
    (RunFolder, "add_row", 1),  # in random search's winner
    (driver, "seconds", 1),  # before search.json is written
]


@pytest.mark.parametrize("crashes", [pytest.param(CRASHES, marks=pytest.mark.slow), [*CRASHES[::3]]], ids=["all", "some"])
def test_a_search_goes_on_after_crashes_in_every_stage(whole, tiny, monkeypatch, crashes):
    """The scores, the winner and its weights are those of an uninterrupted search, bit for bit."""
    config = tiny("name=crashed")
    folder = folder_of(config)
    for owner, name, calls in crashes:
        crash(config, monkeypatch, owner, name, calls)
        if owner is Journal:
            with (folder / "search.jsonl").open("a") as f:
                f.write('{"number": 7, "gener')
        assert not (folder / "search.json").exists()
    assert search(config)["parameters"] == whole[1]["parameters"]
    same(told(folder), told(folder_of(whole[0])))
    log = (folder / "search.log").read_text()
    assert "of at most 12 candidates are scored already" in log
    with pytest.raises(
        ConfigError, match=r"holds a finished search; choose another name=…, or overwrite=true to replace it"
    ):
        search(config)


@pytest.mark.slow
def test_a_search_is_replaced_where_that_is_asked_for(whole, tiny):
    config = tiny("name=again", "search.compare_random=false", "search.generations=0")
    search(config)
    folder = folder_of(config)
    (folder / "notes.txt").write_text("mine")
    config.overwrite, config.search.generations = True, 1
    result = search(config)
    assert result["evaluations"] == len(read_rows(folder / "search.jsonl")) == 8
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_other_settings_are_refused_and_harmless_ones_are_not(tiny, monkeypatch):
    config = tiny()
    crash(config, monkeypatch, RunFolder, "keep", 1)
    for key, said in (
        ("search.population=5", "search.population 4 -> 5"),
        ("search.supernet.train.epochs=3", "search.supernet.train.epochs 2 -> 3"),
        ("optim.lr=0.1", r"optim.lr 0.005 -> 0.1"),
        ("search.seed=4", "search.seed none -> 4"),
    ):
        with pytest.raises(ConfigError, match=f"an unfinished search with other settings in: {said}; choose another name"):
            search(tiny(key))
    with pytest.raises(ConfigError, match=r"resume=auto continues it, overwrite=true drops it"):
        search(tiny("resume=never"))
    assert search(tiny("data.batch_size=200", "search.generations=2"))["evaluations"] == 12


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (["search.max_parameters=100"], "between 0 and 100 parameters; the smallest has"),
        (
            ["search.min_parameters=4000", "search.max_parameters=5000"],
            "between 4,000 and 5,000 parameters; the smallest has",
        ),
    ],
)
def test_a_budget_that_admits_nothing_is_refused_before_anything_is_written(tiny, tmp_path, limits, said):
    with pytest.raises(ConfigError, match=f"search.min_parameters, search.max_parameters: no architecture of .* {said}"):
        search(tiny(*limits))
    assert not (tmp_path / "runs").exists()


def test_methods_without_a_space_are_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"method.name: lora has no space of architectures; choose supernet"):
        search(tiny("method.name=lora"))
    with pytest.raises(VpeftError, match="lora has no size per block 'rnak'; did you mean 'rank'"):
        search(tiny("method.options.modules=[{method: lora, option: rnak}]"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("there", ["supernet/config.yaml", "search.jsonl", "metrics.json"])
def test_a_folder_of_something_else_is_refused(tiny, tmp_path, there):
    file = tmp_path / "runs/run" / there
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    for overwrite in ("false", "true"):
        with pytest.raises(ConfigError, match=r"holds no search but other things .*, which stay; choose another name"):
            search(tiny(f"overwrite={overwrite}"))
    assert file.read_text() == "mine"


@pytest.mark.slow
def test_an_ordinary_run_and_a_search_do_not_mix(whole, tiny_file):
    from vpeft.search.config import load_search_config

    config, _ = whole
    (tiny_file.parent / "plain.yaml").write_text(PLAIN + f"output: {config.output}\n")
    with pytest.raises(ConfigError, match=r"holds other runs, such as .*whole/"):
        train(load_config(tiny_file.parent / "plain.yaml", ["name=whole"]))
    train(load_config(tiny_file.parent / "plain.yaml", ["name=plain", "train.epochs=1"]))
    with pytest.raises(ConfigError, match="holds a run that is no search; choose another name"):
        search(load_search_config(tiny_file, [f"output={config.output}", "name=plain"]))
    with pytest.raises(ConfigError, match="lies in the folder of another run"):
        search(load_search_config(tiny_file, [f"output={config.output}", "name=plain/inner"]))
    assert not (folder_of(config).parent / "plain/inner").exists()


def test_a_locked_folder_is_refused(tiny, monkeypatch):
    config = tiny()
    crash(config, monkeypatch, RunFolder, "keep", 1)
    lock = RunLock(folder_of(config))
    lock.take()
    with pytest.raises(ConfigError, match=r"is locked by process .*, which is running"):
        search(config)
    lock.release()


@pytest.mark.slow
def test_scores_of_another_supernet_are_not_gone_on_with(tiny, monkeypatch):
    config = tiny()
    crash(config, monkeypatch, Journal, "add", 2)
    file = folder_of(config) / "supernet/best.safetensors"
    save_file({k: t + 1 for k, t in load_file(file).items()}, file)
    with pytest.raises(ConfigError, match=r"search.jsonl holds the scores of another supernet"):
        search(config)


def test_the_winner_is_loaded_by_the_library(whole):
    config, result = whole
    folder = folder_of(config) / "winner"
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **size)
    model.load_state_dict(load_file(folder / "backbone.safetensors"), strict=False)
    handle = vpeft.load(model, folder / "best.safetensors")
    assert sum(p.numel() for p in handle.parameters()) == result["parameters"]


def test_the_shipped_searches_stand_on_firm_ground():
    """The spaces and the budgets of the two for digits, whose modules alone are about as large as the budget."""
    for name, total in (("digits", (4**2 + 4**4 + 4**6) ** 3), ("adaptformer_lora_digits", (4**2 + 4**4 + 4**6) ** 2)):
        config = load_search_config(ROOT / f"configs/noah/{name}.yaml")
        ground = driver.survey(config, check(supernet_config(config)))
        assert ground.budget.exact
        assert ground.space.total == total
        assert ground.budget.smallest < config.search.max_parameters < ground.budget.largest
    for name in ("lora", "adapter", "vpt_deep"):
        config = load_config(ROOT / f"configs/noah/alone/{name}.yaml")
        own = sum(p.numel() for p in driver._attached(config, check(config)).parameters())
        assert 0.9 * 12288 <= own <= 12288


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["evolution", "random"])
def test_other_methods_with_a_size_per_block_are_searched_too(tiny, algorithm):
    modules = (
        "[{method: adaptformer, option: bottleneck, values: [1, 2], depths: [1, 2]}, "
        "{method: lora, option: rank, values: [1, 4], depths: null}]"
    )
    config = tiny(
        f"method.options.modules={modules}", "search.max_parameters=null", f"search.algorithm={algorithm}",
        "search.retrain_on=train",
    )  # fmt: skip
    result = search(config)
    assert result["architecture"].keys() == {"adaptformer", "lora"}
    assert result["evaluations"] == 12
    assert ("random" in result) == (algorithm == "evolution")
    file = checkpoint.read(folder_of(config) / result["checkpoint"])
    own = sum(t.numel() for n, t in file.tensors.items() if n not in file.head_names)
    assert own == result["parameters"]
    assert stored_config(folder_of(config) / "winner").data.val_size == 40
    assert not [k for k in result if k.startswith("val_")]
