"""examples/timm_train.py: three lines in a train script; here a short one of timm's parts, with the lines that timm's has."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import vpeft
from vpeft.data.embedded import digits

EXAMPLE = Path(__file__).parents[2] / "examples" / "timm_train.py"
SCRIPT = '''\
"""As timm's: arguments, model, optimizer, schedule, average, checkpoints."""
from __future__ import annotations
import argparse
import os

import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, get_outdir


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir")
    parser.add_argument("--output")
    args = parser.parse_args()
    model = create_model(
        "vit_micro_patch4_28.vpeft_fashion",
        pretrained=True,
        num_classes=2,
    )
    config = resolve_data_config({}, model=model)
    data = create_dataset("", args.data_dir, split="train")
    loader = create_loader(
        data, config["input_size"], 8, is_training=True, no_aug=True, use_prefetcher=False, num_workers=0,
        mean=config["mean"], std=config["std"], device=torch.device("cpu"),
    )
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.01)
    trained = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert all(p.requires_grad == (id(p) in trained) for p in model.parameters())
    scheduler, epochs = create_scheduler_v2(optimizer, num_epochs=2, warmup_epochs=0)
    output_dir = get_outdir(args.output)
    saver = CheckpointSaver(model=model, optimizer=optimizer, checkpoint_dir=output_dir, recovery_dir=output_dir)
    for epoch in range(epochs):
        model.train()
        hits = 0
        for images, labels in loader:
            logits = model(images)
            hits += (logits.argmax(1) == labels).sum().item()
            torch.nn.functional.cross_entropy(logits, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        best_metric, best_epoch = saver.save_checkpoint(epoch, metric=hits)
        scheduler.step(epoch + 1)
    print(f"best epoch {best_epoch}")


if __name__ == "__main__":
    main()
'''


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, EXAMPLE, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def script(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path / "train.py"


def test_the_script_trains_the_method_and_saves_it(script, tmp_path):
    data = digits(None, "train")
    for label in (0, 1):
        folder = tmp_path / "data" / "train" / str(label)
        folder.mkdir(parents=True)
        for i, image in enumerate(data.images[data.labels == label][:16]):
            Image.fromarray(image).save(folder / f"{i}.png")
    done = run(script, "lora, rank=2", "--data-dir", tmp_path / "data", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    added = [line.rpartition(f"{script}:")[2] for line in done.stderr.splitlines() if str(script) in line]
    assert added[0] == "4: import vpeft"
    assert added[1] == '25: peft = vpeft.attach(model, "lora", rank=2)'
    assert added[2].endswith('peft.save(os.path.join(output_dir, "adapter.safetensors"))')

    best = torch.load(tmp_path / "out" / "model_best.pth.tar", weights_only=True)
    model = timm.create_model("vit_micro_patch4_28.vpeft_fashion", pretrained=True, num_classes=2)
    bare = {n: t.clone() for n, t in model.state_dict().items()}
    peft = vpeft.load(model, tmp_path / "out" / "adapter.safetensors")
    assert peft.method.rank == 2
    state = model.state_dict()
    assert state.keys() == best["state_dict"].keys()
    assert all(torch.equal(t, best["state_dict"][n]) for n, t in state.items())
    changed = {n for n, t in state.items() if n in bare and not torch.equal(t, bare[n])}
    assert changed == {"head.weight", "head.bias"}


def test_what_cannot_be_added_is_refused(script, tmp_path):
    assert "averag" in (failed := run(script, "lora", "--model-ema")).stderr
    assert failed.returncode == 1
    other = tmp_path / "other.py"
    other.write_text(SCRIPT.replace("saver.save_checkpoint", "saver.save"))
    failed = run(other, "lora")
    assert failed.returncode == 1
    assert "one `saver.save_checkpoint(…)`" in failed.stderr
    assert run(script).returncode == 1
