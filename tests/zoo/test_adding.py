"""``vpeft zoo add``: from runs to an entry."""

import hashlib
import json
import shlex
import shutil
import statistics
import threading
from pathlib import Path

import pytest
from filelock import FileLock
from omegaconf import OmegaConf

from tests.zoo.conftest import CFG, SHORT
from vpeft import checkpoint
from vpeft.cli import main
from vpeft.engine.config import from_container, load_config
from vpeft.errors import CheckpointError, ConfigError, WriteError
from vpeft.fetching import open_index
from vpeft.files import shipped
from vpeft.zoo import adding, using
from vpeft.zoo.adding import Run, add, command_of
from vpeft.zoo.page import page_of, zoo_page


def changed(run, tmp_path, **values):
    """A copy of a run whose config.yaml and checkpoint say otherwise."""
    copy = tmp_path / "changed"
    shutil.copytree(run, copy)
    config = OmegaConf.load(copy / "config.yaml")
    for key, value in values.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    OmegaConf.save(config, copy / "config.yaml")
    file = checkpoint.read(copy / "best.safetensors")
    metadata = {**file.metadata, "config": OmegaConf.to_container(config)}
    (copy / "best.safetensors").write_bytes(checkpoint.with_metadata(file, metadata))
    return copy


def test_an_entry_says_what_the_runs_were(runs, zoo):
    entry = open_index(zoo).entry("a.linear")
    values = [json.loads((run / "metrics.json").read_text())["test_top1"] for run in runs]
    main_metric = next(m for m in entry["metrics"] if m["name"] == entry["metric"] == "test_top1")
    assert main_metric["values"] == pytest.approx(values, abs=1e-5)
    assert main_metric["mean"] == pytest.approx(statistics.fmean(values), abs=1e-5)
    assert main_metric["std"] == pytest.approx(statistics.stdev(values), abs=1e-5)
    assert (entry["seeds"], entry["parameters"], entry["task"], entry["dataset"]) == (
        [3, 5],
        1290,
        "classification",
        "digits",
    )
    assert entry["seconds"] > 0
    data = (zoo / entry["file"]).read_bytes()
    assert (entry["size"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert using.verify(index=zoo) == {"a.linear": None}


def test_the_file_is_the_first_runs_without_its_machine(runs, zoo, tmp_path):
    mine, its = checkpoint.read(zoo / "adapters/a.linear.safetensors"), checkpoint.read(runs[0] / "best.safetensors")
    assert all((mine.tensors[name] == tensor).all() for name, tensor in its.tensors.items())
    assert mine.metadata["config"]["output"] == "runs"
    assert its.metadata["config"]["output"] != "runs"
    for text in (json.dumps(mine.metadata), (zoo / "index.json").read_text(), page_of(zoo).read_text()):
        assert str(tmp_path.parent) not in text
        assert str(runs[0].parents[2]) not in text


def test_its_command_gives_its_configuration(zoo):
    entry = open_index(zoo).entry("a.linear")
    words = shlex.split(entry["command"])
    assert words[:4] == ["vpeft", "train", "--cfg", CFG]
    assert {*SHORT, "seed=3"} == set(words[4:])
    config = load_config(shipped("configs") / "digits/linear.yaml", words[4:])
    assert config == from_container(entry["config"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=1"],
        ["seed=1", "method.name=lora", "method.options.rank=3", "optim.lr=0.001"],
        ["seed=2", "method.name=lora", "method.options.targets=[q,k]", "data.mean=[0.5,0.5,0.5]", "train.clip_grad=1.0"],
        [
            "seed=2",
            "data.val_split=null",
            "model.kwargs.qkv_bias=true",
            "name='a b'",
            "optim.name=sgd",
            "wandb.mode=offline",
        ],
    ],
)
def test_commands_of_other_configurations(overrides):
    config = OmegaConf.to_container(load_config(shipped("configs") / "digits/lora.yaml", [*overrides, "output=/elsewhere"]))
    words = shlex.split(command_of(config, "configs/digits/lora.yaml"))
    again = OmegaConf.to_container(load_config(shipped("configs") / "digits/lora.yaml", words[4:]))
    assert again == {**config, "output": "runs", "wandb": {**config["wandb"], "mode": "disabled"}}


def test_what_no_command_gives():
    config = OmegaConf.to_container(
        load_config(shipped("configs") / "digits/lora.yaml", ["method.options={}", "method.options.alpha=4"])
    )
    with pytest.raises(ConfigError, match=r"method.options"):
        command_of(config, "configs/digits/lora.yaml")


def test_add_again(runs, zoo, capsys):
    before = (zoo / "index.json").read_text()
    arguments = ["zoo", "add", str(runs[1]), "--name", "a.linear", "--folder", str(zoo), "--cfg", CFG]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "has a 'a.linear' already" in capsys.readouterr().err
    assert (zoo / "index.json").read_text() == before
    main([*arguments, "--overwrite", "--note", "again", "--licence", "MIT"])
    entry = open_index(zoo).entry("a.linear")
    assert (entry["seeds"], entry["notes"], entry["licence"]) == ([5], ["again"], "MIT")
    assert using.verify(index=zoo) == {"a.linear": None}
    assert page_of(zoo).read_text() == zoo_page(zoo)
    assert len(open_index(zoo).entries) == 1


def test_it_says_itself_which_configuration_it_was(runs, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(runs[0], copy)
    environment = json.loads((copy / "environment.json").read_text())
    short = CFG.removeprefix("configs/")
    for words in (
        ["--cfg", f"/somewhere/{CFG}"],
        [f"--cfg={CFG}"],
        ["--cfg", short],
        ["--cfg", short.removesuffix(".yaml")],
    ):
        (copy / "environment.json").write_text(json.dumps({**environment, "command": ["tools/train.py", *words, "seed=3"]}))
        entry, _ = add([copy], "a", folder=tmp_path / "zoo", overwrite=True)
        assert CFG in entry["command"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "no name"),
        ("../a", "no name"),
        ("a/b", "no name"),
        ("A", "no name"),
        ("con", "no name"),
        ("a\0b", "no name"),
        ("ä", "no name"),
    ],
)
def test_names(runs, tmp_path, name, message):
    with pytest.raises(ConfigError, match=message):
        add(runs, name, folder=tmp_path / "zoo", cfg=CFG)
    assert not (tmp_path / "zoo").exists()


def test_what_is_no_set_of_finished_runs(runs, tmp_path):
    folder = tmp_path / "zoo"

    def refused(message, paths, error=ConfigError, **how):
        with pytest.raises(error, match=message):
            add(paths, "a", folder=folder, **{"cfg": CFG, **how})
        assert not folder.exists()

    refused("no run is given", [])
    refused("no folder of a finished run", [tmp_path])
    refused("has the seed 3 of another run", [runs[0], runs[0]])
    refused(r"differ in optim.lr: .* and 0.5", [runs[1], changed(runs[0], tmp_path, optim__lr=0.5)])
    refused("most 1: whoever", runs, CheckpointError, max_kb=1)
    refused("none of the configurations that ship", runs, cfg="configs/digits/no.yaml")
    refused("none of the configurations that ship", runs, cfg="/etc/passwd")
    copy = tmp_path / "copy"
    shutil.copytree(runs[0], copy)
    (copy / "environment.json").unlink()
    refused("environment.json does not say", [copy], cfg=None)
    (copy / "metrics.json").write_text('{"test_top1": null, "trainable": 1}')
    refused("no test_top1", [copy])
    (copy / "metrics.json").write_text("{")
    refused("is damaged", [copy])
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(runs[0] / "config.yaml"), {"seed": 9}), copy / "config.yaml")
    (copy / "metrics.json").write_text((runs[0] / "metrics.json").read_text())
    refused("another configuration than its config.yaml", [copy])


def test_paths_of_this_machine(runs, tmp_path, monkeypatch):
    def added(**values):
        shutil.rmtree(tmp_path / "changed", ignore_errors=True)
        copy = changed(runs[0], tmp_path, **values)
        return add([copy], "a", folder=tmp_path / "zoo", cfg=CFG, overwrite=True)

    entry, notes = added(data__root="/my/images", cache__folder="/scratch", output="/elsewhere")
    assert (entry["config"]["data"]["root"], entry["config"]["cache"]["folder"]) == (None, None)
    assert notes == ["data.root: /my/images, a path of this machine, became None"]
    monkeypatch.chdir(tmp_path)
    entry, _ = added(data__root=str(tmp_path / "data/images"))
    assert entry["config"]["data"]["root"] == "data/images"
    assert "data.root=data/images" in entry["command"]
    places = ("/a/b.safetensors", "C:\\a.safetensors", "~/a.safetensors", "\\\\server\\a")
    for key, path in zip(("init", "model__checkpoint", "data__fashion_mnist", "init"), places, strict=True):
        with pytest.raises(CheckpointError, match="of this machine"):
            added(**{key: path})


def test_frozen_weights_that_nobody_else_has(runs, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(runs[0], copy)
    (copy / "backbone.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"in backbone.safetensors beside it alone"):
        add([copy], "a", folder=tmp_path / "zoo", cfg=CFG)


def test_a_run_read_again_is_the_run(runs):
    run = Run.of(runs[0])
    assert run.config.seed == 3
    assert run.metrics["trainable"] == 1290


def test_somebody_elses_page_stays(runs, tmp_path, capsys):
    notes = tmp_path / "notes.md"
    notes.write_text("# Model zoo\n\nMine.\n")
    with pytest.raises(SystemExit) as error:
        main(["zoo", "add", str(runs[0]), "--name", "a", "--folder", str(tmp_path / "notes"), "--cfg", CFG])
    assert error.value.code == 2
    assert f"the zoo's page would be {notes}" in capsys.readouterr().err
    assert notes.read_text() == "# Model zoo\n\nMine.\n"
    assert not (tmp_path / "notes").exists()


def test_a_page_that_cannot_be_written(runs, tmp_path):
    (tmp_path / "zoo.md").mkdir()
    with pytest.raises(WriteError, match=r"zoo.md cannot be written"):
        add(runs, "a", folder=tmp_path / "zoo", cfg=CFG)
    assert not (tmp_path / "zoo").exists()


def test_all_who_share_a_zoo_lock_the_same_file(runs, zoo, tmp_path, monkeypatch):
    """Whatever their caches are, and where they have none that can be written to."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("VPEFT_CACHE", str(tmp_path / "file" / "cache"))
    started = threading.Event()
    with FileLock(zoo / ".lock"):
        thread = threading.Thread(target=lambda: (started.set(), add(runs, "b", folder=zoo, cfg=CFG)))
        thread.start()
        started.wait()
        thread.join(0.5)
        assert thread.is_alive()
        assert "b" not in open_index(zoo).entries
    thread.join()
    assert set(open_index(zoo).entries) == {"a.linear", "b"}


def test_whoever_may_write_to_a_zoo_may_lock_it(runs, tmp_path):
    folder = tmp_path / "zoo"
    folder.mkdir()
    folder.chmod(0o770)
    add(runs, "a", folder=folder, cfg=CFG)
    assert not (folder / ".lock").exists() or (folder / ".lock").stat().st_mode & 0o777 == 0o660


def test_a_page_with_other_line_ends_is_ours(runs, zoo):
    page_of(zoo).write_bytes(page_of(zoo).read_bytes().replace(b"\n", b"\r\n"))
    add(runs, "b", folder=zoo, cfg=CFG)
    assert "`b`" in page_of(zoo).read_text()


def test_a_folder_that_cannot_be_made(runs, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="cannot be written") as error:
        add(runs, "a", folder=tmp_path / "file" / "zoo", cfg=CFG)
    assert "\n" not in str(error.value)


def test_classes_are_no_paths_and_a_file_url_is_one(runs, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(runs[0], copy)
    file = checkpoint.read(copy / "best.safetensors")
    names = ["/m/01g317", "~a", "C: x", "\\b", *"456789"]
    (copy / "best.safetensors").write_bytes(checkpoint.with_metadata(file, {**file.metadata, "class_names": names}))
    entry, _ = add([copy], "a", folder=tmp_path / "zoo", cfg=CFG)
    assert checkpoint.read(tmp_path / "zoo" / entry["file"]).metadata["class_names"] == names
    for url in ("file:///home/ann/a.safetensors", "FILE:/home/ann/a.safetensors"):
        shutil.rmtree(tmp_path / "changed", ignore_errors=True)
        with pytest.raises(CheckpointError, match="of this machine"):
            add([changed(runs[0], tmp_path, init=url)], "b", folder=tmp_path / "zoo", cfg=CFG)


def test_the_page_says_that_metrics_are_of_the_test_split_only_where_they_are(runs, zoo, tmp_path):
    assert "Metrics are of the test split" in zoo_page(zoo)
    copy = tmp_path / "run"
    shutil.copytree(runs[0], copy)
    metrics = json.loads((copy / "metrics.json").read_text())
    metrics["val_top1"] = metrics.pop("test_top1")
    (copy / "metrics.json").write_text(json.dumps(metrics))
    add([copy], "b", folder=zoo, cfg=CFG)
    page = zoo_page(zoo)
    assert "of the test split" not in page
    assert "val top1 30.43 (1)" in page
    assert "The split that a metric is of stands before it. Mean ±" in page


def test_the_zoo_of_an_installed_package_does_not_grow(runs, monkeypatch, tmp_path):
    inside = Path(adding.__file__).parents[1] / "shipped" / "model_zoo"
    monkeypatch.setattr(adding, "shipped", lambda folder: inside)
    with pytest.raises(ConfigError, match="--folder"):
        add(runs, "a", cfg=CFG)
    assert not inside.exists()
