"""Rates by layer: which rate each tensor has, from timm's own grouping, and what is refused."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.optim import param_groups_layer_decay

import vpeft
from vpeft.engine.layer_rates import by_layer
from vpeft.engine.setup import make_optimizer, make_schedule
from vpeft.engine.train import train
from vpeft.tasks.models import build_model

FULL = ("method.name=full", "method.options={}", "optim.lr=0.01", "schedule.min_lr=0.004", "data.val_size=0")
MODELS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2]},
    ),
}


def bare(kind: str) -> torch.nn.Module:
    name, kwargs = MODELS[kind]
    return timm.create_model(name, num_classes=10, **kwargs)


def rates(config, step: int = 0, kind: str = "vit") -> dict[str, tuple[float, float]]:
    """(rate, weight decay) of each tensor at a step of ten."""
    handle = vpeft.attach(bare(kind), config.method.name, **config.method.options)
    groups = handle.param_groups(config.optim.lr, config.optim.weight_decay, head_lr=config.optim.head_lr)
    optimizer = make_optimizer(config, by_layer(config, handle, groups))
    schedule, _ = make_schedule(config, optimizer, 5)
    schedule.step_update(step)
    names = {id(p): n for n, p in [*handle.named_parameters(), *handle.head_parameters()]}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("step", [0, 10], ids=["start", "end"])
def test_rates_fall_from_layer_to_layer_as_in_timm(tiny, kind, step):
    found = rates(tiny(*FULL, "optim.layer_decay=0.5", "optim.weight_decay=0.1"), step, kind)
    model = bare(kind)
    names = {id(p): n for n, p in model.named_parameters()}
    expected = param_groups_layer_decay(model, 0.1, model.no_weight_decay(), layer_decay=0.5)
    # The end of the schedule is scaled too: else low layers would rise to its lowest rate.
    base = 0.01 if step == 0 else 0.004
    wanted = {names[id(p)]: (base * g["lr_scale"], g["weight_decay"]) for g in expected for p in g["params"]}
    assert found.keys() == wanted.keys()
    table = [name for name in wanted if name.endswith("relative_position_bias_table")]  # exempt by its module here
    for name in wanted:
        assert found[name][0] == pytest.approx(wanted[name][0], rel=1e-6), name
        assert name in table or found[name][1] == wanted[name][1], name
    assert len({rate for rate, _ in found.values()}) == (4 if kind == "vit" else 6)


def test_paths_have_factors_and_the_nearest_one_counts(tiny):
    scales = "optim.lr_scales={patch_embed: 0.1, blocks.1: 0, blocks.1.mlp.fc1.weight: 2.0}"
    found = rates(tiny(*FULL, scales, "optim.head_lr=0.5"), 0)
    assert found["patch_embed.proj.weight"][0] == pytest.approx(0.001)
    assert found["blocks.1.attn.qkv.weight"][0] == 0
    assert found["blocks.1.mlp.fc1.weight"][0] == pytest.approx(0.02)
    assert found["blocks.0.attn.qkv.weight"][0] == found["norm.weight"][0] == pytest.approx(0.01)
    assert found["head.weight"][0] == 0.5
    both = rates(tiny(*FULL, "optim.layer_decay=0.5", "optim.lr_scales={blocks.1: 0.1}"), 0)
    assert both["blocks.1.attn.qkv.weight"][0] == pytest.approx(0.01 * 0.5 * 0.1)


def test_a_run_prints_its_rates_and_steps_by_them(tiny):
    scales = "optim.lr_scales={patch_embed: 0.0, blocks.0: 0.0, pos_embed: 0.0, cls_token: 0.0}"
    config = tiny(*FULL, "optim.layer_decay=0.5", scales, "train.epochs=1", "data.num_samples=100")
    train(config)
    path = Path(config.output, config.name)
    log = (path / "console.log").read_text()
    assert "rate 0.01: 2 tensors of head" in log
    assert "rate 0.005: 14 tensors of blocks.1, norm" in log
    assert "rate 0: " in log
    torch.manual_seed(config.seed)
    before = build_model(config, 10).state_dict()
    after = load_file(path / "last.safetensors")
    still = {n for n, t in after.items() if torch.equal(t, before[n])}
    assert still == {n for n in before if n.startswith(("patch_embed", "blocks.0", "pos_embed", "cls_token"))}
    assert json.loads((path / "log.jsonl").read_text())["lr"] == pytest.approx(0.002)


REFUSED = {
    "lora trains tensors of its own": ["optim.layer_decay=0.5"],
    "linear trains the head alone": ["method.name=linear", "method.options={}", "optim.layer_decay=0.5"],
    "optim.lr_scales: rates by layer are for": ["optim.lr_scales={blocks.0: 0.1}"],
    "optim.lr_scales.block.0: full trains nothing under this path; did you mean 'blocks.0'": [
        "method.name=full", "method.options={}", "optim.lr_scales={block.0: 0.1}",
    ],
    "optim.lr_scales.head: the head has a rate of its own; give optim.head_lr": [
        "method.name=full", "method.options={}", "optim.lr_scales={head: 0.1}",
    ],
    "optim.lr_scales.blocks.0: partial trains nothing": [
        "method.name=partial", "method.options={k: 1}", "optim.lr_scales={blocks.0: 0.1}",
    ],
    "optim.layer_decay: 0.0 is impossible": ["optim.layer_decay=0"],
    "optim.lr_scales.head: -1.0 is impossible": ["optim.lr_scales={head: -1}"],
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_rates_that_cannot_be_had_are_refused_before_a_folder_is_made(tiny, message, tmp_path):
    with pytest.raises(vpeft.VpeftError, match=message):
        train(tiny(*REFUSED[message]))
    assert not (tmp_path / "runs").exists()


def test_a_model_that_timm_does_not_group_is_refused(tiny, monkeypatch, tmp_path):
    monkeypatch.delattr(timm.models.vision_transformer.VisionTransformer, "group_matcher")
    with pytest.raises(vpeft.ConfigError, match=r"group_matcher.*give optim\.lr_scales by path"):
        train(tiny(*FULL, "optim.layer_decay=0.5"))
    assert not (tmp_path / "runs").exists()
