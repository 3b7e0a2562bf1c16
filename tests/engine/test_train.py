import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vpeft
from tests.support.places import ENVIRONMENT, ROOT
from vpeft.cli import main
from vpeft.data.embedded import digits
from vpeft.engine.predict import predict
from vpeft.engine.test import test as evaluate
from vpeft.engine.train import train


def state(path) -> dict[str, torch.Tensor]:
    return load_file(path / "best.safetensors")


def test_run_folder_and_refusal_to_overwrite(tiny, capsys):
    config = tiny()
    metrics = train(config)
    folder = config.output + "/run"
    from pathlib import Path

    path = Path(folder)
    expected = {"config.yaml", "log.jsonl", "console.log", "best.safetensors", "last.safetensors", "metrics.json",
                "curves.png", "environment.json", "state.safetensors", "backbone.safetensors"}  # fmt: skip
    assert {f.name for f in path.iterdir()} == expected
    rows = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in rows] == [0, 1]
    assert all("val_top1" in r and "test_top1" not in r for r in rows), "the test split is touched once, at the end"
    assert json.loads((path / "metrics.json").read_text()) == metrics
    assert {"val_top1", "test_top1", "trainable", "seconds_per_epoch"} <= metrics.keys()
    # 2 blocks, q and v, 2 factors of 2x16, and the head: nothing of the backbone
    assert sum(t.numel() for t in state(path).values()) == metrics["trainable"] == 2 * 2 * 64 + 170
    about = json.loads((path / "environment.json").read_text())
    assert {"torch", "timm", "vpeft"} <= about["versions"].keys()
    assert "test top-1" in capsys.readouterr().out.replace("\n", " ").replace("test\n", "test ")
    with pytest.raises(vpeft.ConfigError, match="finished run"):
        train(config)
    assert train(tiny("overwrite=true"))["test_top1"] == metrics["test_top1"]


def test_a_run_of_one_epoch_has_points_in_its_curves(tiny):
    config = tiny("train.epochs=1")
    train(config)
    picture = np.asarray(Image.open(Path(config.output, "run/curves.png")).convert("RGB")).astype(int)
    third = picture.shape[1] // 3
    for panel, colour in ((1, (255, 127, 14)), (2, (31, 119, 180))):  # accuracy, learning rate; they have no legend
        near = abs(picture[:, panel * third : (panel + 1) * third] - colour).sum(-1) < 20
        assert near.sum() > 20, panel


def test_best_epoch_is_chosen_on_validation(tiny, monkeypatch):
    from vpeft.engine.loop import Trainer

    asked, real = [], Trainer.evaluate

    def evaluate_split(self, split):
        values = real(self, split)
        asked.append(split)
        if split == "val" and len(asked) <= 3:
            values["top1"] = {1: 10.0, 2: 90.0, 3: 50.0}[len(asked)]
        return values

    monkeypatch.setattr(Trainer, "evaluate", evaluate_split)
    config = tiny("train.epochs=3")
    assert train(config)["epoch"] == 2
    assert asked == ["val"] * 4 + ["test"]


def test_test_and_predict_agree_with_the_run(tiny, tmp_path, capsys):
    config = tiny("train.epochs=6", "method.options.rank=4")
    metrics = train(config)
    best = f"{config.output}/run/best.safetensors"
    config.model.pretrained = False
    # The tiny backbone has random weights: those that the run kept are found, whatever the seed says now.
    assert evaluate(tiny("seed=5"), best)["top1"] == pytest.approx(metrics["test_top1"])
    import timm
    from accelerate.utils import set_seed
    from safetensors.torch import save_file

    from vpeft.tasks.models import build_model

    set_seed(config.seed)
    weights = tmp_path / "backbone.safetensors"
    save_file(build_model(config, 10).state_dict(), weights)
    test_config = tiny("model.pretrained=true", f"model.checkpoint={weights}", "train.epochs=6")
    values = evaluate(test_config, best)
    assert values["top1"] == pytest.approx(metrics["test_top1"])
    merged = evaluate(test_config, best, merge=True)
    assert merged["top1"] == pytest.approx(values["top1"], abs=0.2)
    assert timm.is_model("vit_tiny_patch16_224")

    held, folder = digits(None, "test"), tmp_path / "images"
    folder.mkdir()
    for i in range(40):
        Image.fromarray(held.images[i]).save(folder / f"{i:02d}.png")
    capsys.readouterr()
    found = predict(best, [folder], topk=3, weights=str(weights), json_file=tmp_path / "out.json")
    assert len(found) == 40
    assert json.loads((tmp_path / "out.json").read_text()) == found
    right = sum(f["classes"][0]["class"] == str(held.labels[i]) for i, f in enumerate(found))
    assert right / 40 == pytest.approx(metrics["test_top1"] / 100, abs=0.2)
    with pytest.raises(vpeft.DataError, match="does not exist"):
        predict(best, [tmp_path / "nothing"], weights=str(weights))
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(vpeft.DataError, match=r"broken\.png is not a readable image"):
        predict(best, [tmp_path / "broken.png"], weights=str(weights))


def test_predict_from_a_checkpoint_alone(tmp_path, capsys):
    """The embedded backbone needs no weight file: the checkpoint's metadata is enough."""
    import timm

    model = timm.create_model("vit_micro_patch4_28.vpeft_fashion", pretrained=True, num_classes=3)
    peft = vpeft.attach(model, "lora", rank=2)
    peft.save(tmp_path / "a.safetensors", class_names=["x", "y", "z"])
    peft.eval()
    image = Image.fromarray(digits(None, "test").images[0])
    image.save(tmp_path / "d.png")
    main(["predict", "--ckpt", str(tmp_path / "a.safetensors"), str(tmp_path / "d.png"), "--topk", "1"])
    printed = capsys.readouterr().out
    from timm.data import create_transform, resolve_model_data_config

    transform = create_transform(**resolve_model_data_config(model))
    with torch.no_grad():
        best = model(transform(image.convert("RGB"))[None]).argmax().item()
    assert f"\t{'xyz'[best]} " in printed


def test_same_seed_same_weights_other_seed_others(tiny):
    runs = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = tiny(f"name={name}", f"seed={seed}", "train.epochs=1")
        train(config)
        from pathlib import Path

        runs[name] = state(Path(config.output) / name)
    assert all(torch.equal(runs["a"][k], runs["b"][k]) for k in runs["a"])
    assert not all(torch.equal(runs["a"][k], runs["c"][k]) for k in runs["a"])


def test_accumulation_equals_one_batch(tiny):
    from pathlib import Path

    found = []
    for parts in (1, 3):
        config = tiny(f"name=p{parts}", f"train.accumulate={parts}", "train.epochs=1", "optim.name=sgd", "optim.lr=0.1")
        train(config)
        found.append(state(Path(config.output) / f"p{parts}"))
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], atol=1e-6), name


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.precision=bf16", "train.clip_grad=1.0", "train.ema=0.9"],
        ["train.grad_checkpointing=true", "train.label_smoothing=0.1", "optim.name=sgd"],
        ["augment.enabled=true", "augment.mixup=0.4", "augment.cutmix=1.0", "augment.auto_augment=rand-m5-n2"],
        ["model.drop_path=0.2", "train.select=last", "train.drop_last=true", "schedule.warmup_epochs=1"],
        ["data.val_size=0", "method.name=linear", "method.options={}"],
    ],
)  # fmt: skip
def test_options_run(tiny, overrides):
    if "method.options={}" in overrides:
        config = tiny(*[o for o in overrides if not o.startswith("method")])
        config.method.name, config.method.options = "linear", {}
    else:
        config = tiny(*overrides)
    metrics = train(config)
    assert 0 <= metrics["test_top1"] <= 100
    assert torch.isfinite(torch.tensor(metrics["test_loss"]))


def test_ema_tests_the_average(tiny):
    from pathlib import Path

    config = tiny("train.ema=0.999", "train.epochs=1")
    train(config)
    folder = Path(config.output) / "run"
    plain = tiny("train.epochs=1", "name=plain")
    train(plain)
    averaged, last = state(folder), state(Path(plain.output) / "plain")
    b = "blocks.0.attn.qkv.lora.q.b"
    assert 0 < averaged[b].abs().max() < 0.1 * last[b].abs().max()


def test_a_loss_that_is_not_finite_ends_the_run(tiny):
    with pytest.raises(vpeft.VpeftError, match=r"training loss is (nan|inf)"):
        train(tiny("optim.name=sgd", "optim.lr=1e6"))


def test_tensors_that_get_no_gradient_are_reported(tiny, capsys):
    """VPT's adapter baseline starts with both weights at zero: only its last bias can ever learn."""
    from pathlib import Path

    config = tiny("train.epochs=1")
    config.method.name, config.method.options = "adapter", {"preset": "vpt", "bottleneck": 4}
    train(config)
    log = (Path(config.output) / "run/console.log").read_text()
    assert "no gradient in the first 5 steps reached 6 trained tensors: blocks.0.adapter_mlp.down.weight" in log
    train(tiny("name=lora"))
    assert "no gradient" not in (Path(config.output) / "lora/console.log").read_text()


def test_command_line_errors_are_one_line(tiny_file):
    done = subprocess.run(
        [sys.executable, ROOT / "tools/train.py", "--cfg", tiny_file, "train.epochz=1"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("ConfigError: train.epochz: unknown key")
    assert "Traceback" not in done.stderr


def test_methods_command(capsys):
    main(["methods"])
    assert "adaptformer" in capsys.readouterr().out
    main(["methods", "lora"])
    assert "2106.09685" in capsys.readouterr().out


def test_wandb_offline_writes_a_run(tiny):
    pytest.importorskip("wandb")
    from pathlib import Path

    config = tiny("wandb.mode=offline", "train.epochs=1")
    train(config)
    assert list((Path(config.output) / "run").glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.slow
def test_shell_tools(tiny_file):
    done = subprocess.run(
        ["bash", ROOT / "tools/train.sh", tiny_file, "train.epochs=1"],
        capture_output=True, text=True, check=False, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tiny_file.parent / "runs/run/metrics.json").exists()
    assert subprocess.run(["bash", ROOT / "tools/dist_train.sh"], capture_output=True).returncode == 2


def test_poly_falls_by_its_power(tiny):
    """Learning rates after each epoch against lr * (1 - t / T) ** power + the floor."""
    for power in (1.0, 2.0):
        config = tiny(
            f"schedule.power={power}", "schedule.name=poly", "schedule.min_lr=0", f"name=p{power}", "train.epochs=3"
        )
        train(config)
        rows = [json.loads(line) for line in (Path(config.output) / config.name / "log.jsonl").read_text().splitlines()]
        wanted = [5e-3 * (1 - e / 3) ** power for e in (1, 2, 3)]
        assert [r["lr"] for r in rows] == pytest.approx(wanted, abs=1e-9)
