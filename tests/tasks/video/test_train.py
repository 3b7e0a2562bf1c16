"""``task: video`` from the configuration to predictions, on motion clips that the run writes itself."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vpeft
from vpeft.cli import main
from vpeft.engine.config import load_config
from vpeft.engine.predict import predict
from vpeft.engine.test import test as evaluate
from vpeft.engine.train import check, train
from vpeft.reporting.tables import read_csv
from vpeft.tasks.video.motion import MOTIONS

CONFIG = """
task: video
report: none
model: {name: vit_micro_patch4_28.vpeft_fashion, pretrained: true}
method: {name: bitfit}
data: {source: motion, batch_size: 5}
video: {frames: 2, sampling: dense, motion: {train: 20, test: 10, frames: 4}}
train: {epochs: 2, batch_size: 8, select: last}
optim: {lr: 1.0e-3}
"""


@pytest.fixture
def make(tmp_path):
    file = tmp_path / "video.yaml"
    file.write_text(CONFIG + f"output: {tmp_path / 'runs'}\n")
    return lambda *overrides: load_config(file, [f"data.root={tmp_path / 'clips'}", *overrides])


def test_train_test_and_predict(make, tmp_path, capsys):
    config = make("train.label_smoothing=0.1", "augment.enabled=true", "augment.mixup=0.2", "data.val_size=5", "report=full")
    metrics = train(config)
    folder = Path(config.output) / "run"
    found = [row[1:5] for row in read_csv(folder / "predictions.csv")[1:]]
    assert 10 * sum(true == predicted for _, true, predicted, _ in found) == pytest.approx(metrics["test_top1"], abs=1e-3)
    assert all(Path(name).is_file() and float(share) <= 1 for name, _, _, share in found)
    assert (folder / "report.html").read_text().count("data:image/") == 5, "the clips too"
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(0 < row["data_seconds"] < row["train_seconds"] for row in rows)
    assert "waiting for data" in (folder / "console.log").read_text()
    with Image.open(folder / "clips.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50, "frames and words"
    assert metrics["test_top1"] % 10 == pytest.approx(0, abs=1e-4), "ten clips"

    best = folder / "best.safetensors"
    assert evaluate(config, best)["loss"] == pytest.approx(metrics["test_loss"], rel=1e-5)
    views = evaluate(make("video.views=3"), best)
    assert views["loss"] != pytest.approx(metrics["test_loss"], rel=1e-5)

    clips = Path(config.data.root) / "test"
    found = predict(best, [clips], topk=2, batch_size=4, json_file=tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == found
    assert len(found) == 10
    right = sum(f["classes"][0]["class"] == MOTIONS[i] for i, f in enumerate(found))
    assert right * 10 == pytest.approx(metrics["test_top1"]), "the judgement of the run, from the files alone"
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(vpeft.DataError, match=r"broken\.mp4: not a readable video"):
        predict(best, [tmp_path / "broken.mp4"])


def test_broken_videos_are_reported_at_the_end(make, tmp_path):
    make_clips(make)
    lists = tmp_path / "clips"
    (lists / "train" / "00003.mp4").write_bytes(b"")
    common = ("train.epochs=1", "data.source=list")
    with pytest.raises(vpeft.DataError, match=r"00003\.mp4"):
        train(make(*common))
    metrics = train(make(*common, "data.skip_broken=true"))
    log = (tmp_path / "runs" / "run" / "console.log").read_text()
    assert "train: 1 left out\n" in log
    assert "00003.mp4: the video file is empty" in log
    assert (metrics["train_skipped"], metrics["test_skipped"]) == (1, 0)
    assert json.loads((tmp_path / "runs" / "run" / "metrics.json").read_text()) == metrics


def test_a_dropped_video_takes_no_part_in_the_mean_loss(make, tmp_path, monkeypatch):
    """A third of the reads fail; the loss of an untrained classifier over ten classes stays near ln 10."""
    from vpeft.tasks.video.data import Clips

    make_clips(make)
    real = Clips.clip

    def failing(self, index):
        if self.training and index % 3 == 0:
            raise vpeft.DataError(f"{index}: broke just now")
        return real(self, index)

    monkeypatch.setattr(Clips, "clip", failing)
    train(make("train.epochs=1", "optim.lr=0", "schedule.min_lr=0", "video.skip_broken=true"))
    row = json.loads((tmp_path / "runs" / "run" / "log.jsonl").read_text().splitlines()[0])
    monkeypatch.undo()
    train(make("train.epochs=1", "optim.lr=0", "schedule.min_lr=0", "name=whole"))
    whole = json.loads((tmp_path / "runs" / "whole" / "log.jsonl").read_text().splitlines()[0])
    assert row["train_loss"] == pytest.approx(whole["train_loss"], rel=0.1)
    assert json.loads((tmp_path / "runs" / "run" / "metrics.json").read_text())["train_skipped"] == 7


def make_clips(make) -> None:
    from vpeft.tasks.video.motion import make_motion

    config = make()
    make_motion(config.data.root, config.video.motion)


def test_mistakes_end_before_work(make, tmp_path, capsys):
    for override, message in (
        ("video.frame=8", "video.frame: unknown key; did you mean 'frames'"),
        ("video.sampling=densely", "did you mean 'dense'"),
        ("video.views=0", "video.views"),
        ("data.source=digits", "data.source: 'digits' is not a source of videos"),
        ("cache.mode=memory", "cache.mode"),
    ):
        with pytest.raises(vpeft.VpeftError, match=message):
            check(make(override))
    with pytest.raises(vpeft.ConfigError, match=r"video\.frames: 3 frames do not make whole tubelets of 2"):
        check(make("video.mode=joint", "video.frames=3"))
    assert not (tmp_path / "clips").exists()


def test_motion_clips_and_throughput_from_the_command_line(tmp_path, capsys):
    main(["motion-clips", "--out", str(tmp_path / "m"), "--train", "10", "--test", "10", "--turn", "12.5"])
    assert "10 training and 10 test clips" in capsys.readouterr().out
    assert json.loads((tmp_path / "m" / "motion.json").read_text())["turn"] == 12.5
    main(["bench-decode", str(tmp_path / "m"), "--clips", "6", "--frames", "4", "--size", "28"])
    assert capsys.readouterr().out.count("clips per second") == 3


@pytest.mark.parametrize("method", ["bitfit", "vpt_deep"])
def test_joint_model_from_training_to_predictions(make, tmp_path, method):
    config = make(
        f"method.name={method}", "video.mode=joint", "video.tubelet=1", "model.img_size=20", "video.motion.size=20"
    )
    metrics = train(config)
    best = tmp_path / "runs" / "run" / "best.safetensors"
    assert evaluate(config, best)["loss"] == pytest.approx(metrics["test_loss"], rel=1e-5)
    found = predict(best, [tmp_path / "clips" / "test"], topk=1)
    right = sum(f["classes"][0]["class"] == MOTIONS[i] for i, f in enumerate(found))
    assert right * 10 == pytest.approx(metrics["test_top1"])


def test_methods_along_time_learn_the_length_of_the_clips(make, tmp_path):
    """AIM refuses clips of another length than its own, so it must have been told."""
    common = ("method.name=aim", "train.epochs=1")
    train(make(*common, "method.options.frames=2"))
    with pytest.raises(vpeft.MethodError, match="clips of 2 frames"):
        train(make(*common, "method.options.frames=4", "name=other"))
