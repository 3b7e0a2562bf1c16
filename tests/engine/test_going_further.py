"""A finished run goes on, a new one starts from a checkpoint, one ends early; and runs without pretrained weights."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import vpeft
from tests.support.runs import interrupted
from tests.support.signed import edited
from vpeft import checkpoint
from vpeft.cli import main
from vpeft.data.embedded import digits
from vpeft.engine.loop import Trainer
from vpeft.engine.plan import extended
from vpeft.engine.predict import predict
from vpeft.engine.progress import Pace
from vpeft.engine.run import RunFolder
from vpeft.engine.test import test as evaluate
from vpeft.engine.train import train


def folder_of(config) -> Path:
    return Path(config.output) / config.name


def weights(config, kind="last"):
    return checkpoint.read(folder_of(config) / f"{kind}.safetensors").tensors


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- extending ----


@pytest.mark.parametrize(
    ("schedule", "whole"),
    [
        pytest.param("constant", "train.epochs=4", marks=pytest.mark.slow),
        pytest.param("step", "train.epochs=4", marks=pytest.mark.slow),
        ("cosine", "schedule.cooldown_epochs=2"),
        pytest.param("poly", "schedule.cooldown_epochs=2", marks=pytest.mark.slow),
    ],
)
def test_an_extended_run_is_the_longer_one_bit_for_bit(tiny, tiny_file, capsys, schedule, whole):
    """Of a schedule without end the run with more epochs, of another one the run with a longer cooldown."""
    options = [f"schedule.name={schedule}", "train.ema=0.9"]
    first = train(tiny(*options))
    main(["train", "--cfg", str(tiny_file), "--extend", "2", *options])
    longer = tiny(*options, whole, "name=longer")
    train(longer)
    for kind in ("last", "best"):
        assert same(weights(tiny(), kind), weights(longer, kind)), kind
    rows = [[json.loads(x)["lr"] for x in (folder_of(c) / "log.jsonl").read_text().splitlines()] for c in (tiny(), longer)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 4
    assert first["epoch"] <= 2


def test_an_extension_that_is_interrupted_goes_on(tiny, monkeypatch):
    options = ["schedule.name=constant"]
    train(tiny(*options))
    real = Trainer._epoch

    def stop(at):
        def epoch(self):
            if self.epoch == at:
                raise KeyboardInterrupt
            real(self)

        return epoch

    config = tiny(*options)
    extended(config, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_epoch", stop(2))
        with pytest.raises(KeyboardInterrupt, match=r"the finished run in .* is whole"):
            train(config)
        assert (folder_of(config) / "metrics.json").exists()
        config = tiny(*options)
        extended(config, 2)
        assert config.train.extend == 2, "nothing was added yet"
        patch.setattr(Trainer, "_epoch", stop(3))
        with pytest.raises(KeyboardInterrupt, match="after epoch 3"):
            train(config)
    again = tiny(*options)
    extended(again, 2)
    assert again.train.extend == 2, "what it had left"
    train(tiny(*options))  # also without the option
    assert len((folder_of(config) / "log.jsonl").read_text().splitlines()) == 4
    with pytest.raises(vpeft.ConfigError, match="--extend N to train it further"):
        train(tiny(*options, "train.extend=2"))


@pytest.mark.parametrize("method", ["adamix", pytest.param("prefix", marks=pytest.mark.slow)])
def test_the_chosen_epoch_comes_back_as_training_had_it(tiny, monkeypatch, method):
    """Some methods' files hold a simpler form than training has: after a kill among the last files, and in an extension."""
    options = {"adamix": "{bottleneck: 2, experts: 2}", "prefix": "{tokens: 2, form: perceptron, hidden: 4}"}
    config = tiny(f"method.name={method}", f"method.options={options[method]}", "schedule.name=constant")
    real, seen = Trainer.evaluate, []

    def first_is_best(self, split):
        found = real(self, split)
        if split == "val":
            seen.append(found["top1"])
            found["top1"] = -len(seen)
        return found

    monkeypatch.setattr(Trainer, "evaluate", first_is_best)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    best = weights(config, "best")
    metrics = train(config)
    assert metrics["epoch"] == 1
    assert same(weights(config, "best"), best)
    extended(config, 1)
    longer = train(config)
    assert (longer["epoch"], longer["test_top1"]) == (1, metrics["test_top1"])
    assert same(weights(config, "best"), best)
    assert "lost_best" not in longer


def killed(*args):
    raise KeyboardInterrupt


def test_an_extension_is_unfinished_before_its_files_change(tiny, monkeypatch):
    """Else metrics.json would tell of other weights than the files have."""
    config = tiny("schedule.name=constant")
    train(config)
    extended(config, 1)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "keep", killed)
        with pytest.raises(KeyboardInterrupt, match="goes on from the state after epoch 2"):
            train(config)
    assert not (folder_of(config) / "metrics.json").exists()
    longer = tiny("schedule.name=constant", "train.epochs=3", "name=longer")
    assert train(tiny("schedule.name=constant"))["epoch"] == train(longer)["epoch"]
    assert same(weights(config), weights(longer))


def test_what_cannot_be_extended(tiny, tiny_file, capsys):
    config = tiny()
    with pytest.raises(vpeft.ConfigError, match=r"--extend: .* holds no run"):
        extended(config, 2)
    with pytest.raises(vpeft.ConfigError, match="overwrite=true would drop the run that is to be extended"):
        extended(tiny("overwrite=true"), 2)
    train(tiny("schedule.min_lr=0"))
    for options, why in (
        (["schedule.min_lr=0"], "the cosine schedule ends at a rate of 0"),
        (["optim.lr=1e-4"], r"with other settings: optim\.lr 0\.005 -> 0\.0001, schedule\.min_lr"),
    ):
        with pytest.raises(SystemExit):
            main(["train", "--cfg", str(tiny_file), "--extend", "1", *options])
        assert re.search(why, capsys.readouterr().err)
    with pytest.raises(SystemExit):
        main(["train", "--cfg", str(tiny_file), "--extend", "0"])
    train(tiny("name=old", "schedule.name=constant"))
    (folder_of(tiny("name=old")) / "state.safetensors").unlink()  # as earlier versions left it
    config = tiny("name=old", "schedule.name=constant")
    extended(config, 1)
    with pytest.raises(vpeft.ConfigError, match=r"its state was not kept; start another run from its weights: init=.*last"):
        train(config)


# ---- starting from a checkpoint ----


def test_a_run_starts_from_a_checkpoint(tiny, monkeypatch):
    train(tiny("name=first", "train.epochs=4"))
    path = folder_of(tiny("name=first")) / "last.safetensors"
    started = {}
    real = Trainer.fit

    def fit(self):
        started.update(self.handle.state_dict() | self.handle.head_state_dict())
        started.update({k: v.clone() for k, v in started.items()})
        return real(self)

    monkeypatch.setattr(Trainer, "fit", fit)
    config = tiny("name=second", f"init={path}", "train.epochs=1")
    train(config)
    assert same(started, checkpoint.read(path).tensors)
    log = " ".join((folder_of(config) / "console.log").read_text().split())
    assert f"starting from {path} and its classifier" in log
    path = edited(path, lambda metadata, _: metadata.update(class_names=list("abcdefghij")))
    other = ["train.epochs=1", "name=third"]
    train(tiny(*other, f"init={path}"))
    log = " ".join((folder_of(tiny(*other)) / "console.log").read_text().split())
    assert "left out: its classifier, which is of other classes (a, b, c …)" in log
    head = next(n for n in started if n.startswith("head"))
    assert not torch.equal(started[head], checkpoint.read(path).tensors[head])


def test_rows_of_the_classifier_follow_the_names(tiny):
    from vpeft.engine.start import _head
    from vpeft.tasks.models import build_model

    train(tiny("train.epochs=1"))
    file = checkpoint.read(folder_of(tiny()) / "last.safetensors")
    handle = vpeft.attach(build_model(tiny(), 10), "lora", rank=2)
    names = [str(i) for i in (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)]
    head, said = _head(file, handle, names)
    assert said == ""
    assert all(torch.equal(head[n], file.tensors[n][[int(c) for c in names]]) for n in head)
    assert head.keys() == file.head_names


def test_a_checkpoint_of_something_else_is_refused(tiny):
    train(tiny("train.epochs=1"))
    path = folder_of(tiny()) / "last.safetensors"
    for options, why in (
        (["method.name=adaptformer"], "it holds lora, this run trains adaptformer"),
        (["method.options.rank=4"], "shape"),
        (["seed=7"], "another backbone"),
    ):
        with pytest.raises(vpeft.ConfigError, match=f"^init: .*{why}"):
            train(tiny("name=next", f"init={path}", *options))
    assert not (folder_of(tiny()).parent / "next").exists()


# ---- ending early ----


def test_a_run_ends_when_nothing_gets_better(tiny, monkeypatch):
    values, real, stopping = [], Trainer.evaluate, iter([10.0, 50.0, 40.0, 30.0, 20.0, 60.0])

    def evaluate_split(self, split):
        found = real(self, split)
        if split == "val" and self.average is None and len(values) < 4:
            values.append(found | {"top1": next(stopping)})
            return values[-1]
        return found

    monkeypatch.setattr(Trainer, "evaluate", evaluate_split)
    config = tiny("train.epochs=9", "train.patience=2")
    interrupted(config, 3)
    metrics = train(config)
    assert (metrics["epoch"], metrics["stopped_early"]) == (2, 4)
    log = " ".join((folder_of(config) / "console.log").read_text().split())
    assert "stopped early after epoch 4: no better one than epoch 2 in train.patience=2 epochs" in log
    assert len((folder_of(config) / "log.jsonl").read_text().splitlines()) == 4
    again = tiny("train.epochs=9", "train.patience=2")
    extended(again, 1)
    with pytest.raises(vpeft.ConfigError, match=r"was stopped early by train\.patience=2 after epoch 4"):
        train(again)


def test_the_end_of_the_whole_run_is_estimated(tiny):
    pace = Pace()
    assert pace.left(5) == ""
    for seconds in (50, 10, 10):
        pace.add(seconds)
    assert re.fullmatch(r"about 50 s left, until \d\d:\d\d", pace.left(5))
    assert pace.left(60, at_most=True).startswith("at most 10 min left, until ")
    assert re.fullmatch(r"about 27\.8 h left, until \w{3} \d\d \w{3} \d\d:\d\d", pace.left(10_000))
    config = tiny()
    train(config)
    log = (folder_of(config) / "console.log").read_text()
    assert len(re.findall(r"left, until \d\d:\d\d", log)) == 1, "of the last epoch there is nothing left"


def test_the_version_is_said(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert re.fullmatch(r"vpeft \d+\.\d+.*", capsys.readouterr().out.strip())


# ---- frozen weights that came from no file ----


def test_a_backbone_without_pretrained_weights_is_found_again(tiny, tmp_path):
    config = tiny("train.epochs=3")
    metrics = train(config)
    log = " ".join((folder_of(config) / "console.log").read_text().split())
    assert log.index("no other file has the frozen weights") < log.index("epoch 1/3")
    moved = tmp_path / "moved"
    shutil.move(folder_of(config), moved)
    best = moved / "best.safetensors"
    other = tiny("seed=11")
    assert evaluate(other, best)["top1"] == pytest.approx(metrics["test_top1"])
    image = tmp_path / "seven.png"
    Image.fromarray(digits(None, "test").images[0]).save(image)
    found = predict(best, [image])
    shutil.copy(best, tmp_path / "alone.safetensors")  # drawn again from the seed
    assert predict(tmp_path / "alone.safetensors", [image])[0]["classes"] == found[0]["classes"]
    assert evaluate(other, tmp_path / "alone.safetensors")["top1"] == pytest.approx(metrics["test_top1"])
    weight = "patch_embed.proj.weight"
    file = moved / "backbone.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    save_file(tensors | {weight: tensors[weight] + 1}, file)
    with pytest.raises(vpeft.CheckpointError, match="another backbone"):
        evaluate(other, best)
    file.write_bytes(b"damaged")
    with pytest.raises(vpeft.CheckpointError, match=r"backbone\.safetensors is damaged"):
        predict(best, [image])


def test_weights_that_nobody_has_are_said_to_be_missing(tiny, monkeypatch):
    from vpeft.tasks import frozen

    config = tiny("train.epochs=1")
    train(config)
    (folder_of(config) / "backbone.safetensors").unlink()
    real = frozen.seeded
    monkeypatch.setattr(frozen, "seeded", lambda seed: real(seed + 1))  # as another version of torch draws
    with pytest.raises(vpeft.CheckpointError, match=r"its frozen weights were random ones, which are not in .*backbone"):
        evaluate(tiny(), folder_of(config) / "best.safetensors")


def test_nothing_is_kept_that_other_files_have(tiny):
    config = tiny("train.epochs=1")
    config.method.name, config.method.options = "full", {}
    train(config)
    assert not (folder_of(config) / "backbone.safetensors").exists(), "the checkpoint has all"
    evaluate(tiny("seed=3"), folder_of(config) / "best.safetensors")
