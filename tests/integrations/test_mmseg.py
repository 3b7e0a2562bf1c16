"""mmsegmentation with an adapted timm backbone: the stand-in for compiled operators, training, interruption, resumption."""

import importlib
import math
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import vpeft
from tests.support.mmseg import backbone, config, run, runner_of, same, scenes
from vpeft.integrations.mmseg import TrainedOnly, load_trained, trained_tensors
from vpeft.tasks.segmentation import mmcv_ops

EXAMPLES = Path(__file__).parents[2] / "configs" / "mmseg"


# ---- the stand-in ----


def test_points_are_sampled_bilinearly():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    points = torch.rand(2, 11, 2, dtype=torch.float64)
    found = mmcv_ops.point_sample(x, points)
    for b in range(2):
        for p in range(11):
            u, v = points[b, p, 0].item() * 7 - 0.5, points[b, p, 1].item() * 5 - 0.5
            wanted = torch.zeros(3, dtype=torch.float64)
            for i, wi in ((math.floor(v), math.floor(v) + 1 - v), (math.floor(v) + 1, v - math.floor(v))):
                for j, wj in ((math.floor(u), math.floor(u) + 1 - u), (math.floor(u) + 1, u - math.floor(u))):
                    if 0 <= i < 5 and 0 <= j < 7:
                        wanted += wi * wj * x[b, :, i, j]
            assert torch.allclose(found[b, :, p], wanted, atol=1e-12)
    assert mmcv_ops.point_sample(x, points.view(2, 11, 1, 2)).shape == (2, 3, 11, 1)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_focal_loss_is_its_formula(reduction):
    torch.manual_seed(0)
    x, target, weight = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 4, 1]), torch.rand(4)
    one_hot = torch.zeros(6, 4)
    for row, label in enumerate(target):
        if label < 4:
            one_hot[row, label] = 1
    p = x.sigmoid()
    loss = -0.3 * (1 - p) ** 1.5 * p.log() * one_hot - 0.7 * p**1.5 * (1 - p).log() * (1 - one_hot)
    loss = loss * torch.stack([weight[min(int(t), 3)] for t in target])[:, None]
    wanted = {"none": loss, "mean": loss.sum() / 6, "sum": loss.sum()}[reduction]
    found = mmcv_ops.sigmoid_focal_loss(x, target, 1.5, 0.3, weight, reduction)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_real_operators_are_left_alone(monkeypatch):
    import mmcv

    real = type(sys)("mmcv.ops")
    monkeypatch.setitem(sys.modules, "mmcv.ops", real)
    monkeypatch.setattr(mmcv, "ops", real)
    assert mmcv_ops.install() is False
    assert sys.modules["mmcv.ops"] is real


@pytest.fixture
def half_written(monkeypatch, tmp_path):
    """yapf not yet imported, and its stored grammar as another process leaves it for a moment: empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def forget():
        for name in [n for n in sys.modules if n.partition(".")[0] in ("yapf", "yapf_third_party")]:
            monkeypatch.delitem(sys.modules, name)

    forget()
    importlib.import_module("yapf")
    files = {file: file.read_bytes() for file in tmp_path.rglob("*.pickle")}
    assert files
    for file in files:
        file.write_bytes(b"")
    forget()
    return files


def test_a_grammar_that_another_process_is_writing_is_waited_for(half_written):
    def written():
        for file, content in half_written.items():
            file.write_bytes(content)

    later = threading.Timer(0.3, written)
    later.start()
    mmcv_ops._settle_yapf(wait=0.1)
    later.join()
    assert importlib.import_module("yapf").__version__


def test_a_grammar_that_stays_damaged_is_named(half_written):
    with pytest.raises(ImportError, match="yapf's stored grammar is damaged"):
        mmcv_ops._settle_yapf(attempts=2, wait=0.01)


@pytest.mark.parametrize("operator", [mmcv_ops.CrissCrossAttention, mmcv_ops.PSAMask])
def test_compiled_operators_say_what_they_are(operator):
    with pytest.raises(ImportError, match="compiled operator of mmcv"):
        operator(8)


# ---- the backbone ----


def test_backbone_is_frozen_but_for_its_method():
    model = backbone(method={"name": "adaptformer", "bottleneck": 4}, pyramid="feature2pyramid")
    maps = model.train()(torch.randn(2, 3, 32, 32))
    assert [tuple(m.shape) for m in maps] == [(2, 32, 16, 16), (2, 32, 8, 8), (2, 32, 4, 4), (2, 32, 2, 2)]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("vpeft.adaptformer" in n or "pyramid" in n for n in trained)
    training = {n for n, m in model.timm.named_modules() if m.training}
    assert training == {n for n, _ in model.timm.named_modules() if n.startswith("vpeft.adaptformer")}
    assert model.maps.pyramid.training
    assert not model.eval().handle.root.training
    saved = trained_tensors(model)
    assert {n for n in saved if n.startswith("method.")} == {f"method.{n}" for n in model.handle.state_dict()}
    assert {n for n in saved if "pyramid" in n} == {n for n in model.state_dict() if "pyramid" in n}
    assert len(saved) == len(model.handle.state_dict()) + len(model.maps.pyramid.state_dict())


def test_pretrained_weights_outlive_the_initialisation_of_the_runner():
    from mmengine.model import BaseModule

    class Segmentor(BaseModule):
        def __init__(self):
            super().__init__()
            self.backbone = backbone(method={"name": "lora", "rank": 2}, pyramid="beit")

    model = Segmentor()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.init_weights()
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_backbone_without_a_method_is_wholly_frozen():
    model = backbone()
    assert model.handle is None
    assert not any(p.requires_grad for p in model.parameters())
    assert trained_tensors(model) == {}


@pytest.mark.parametrize(
    ("method", "message"),
    [({"name": "side_tuning"}, "classifier"), ({"name": "fish"}, "looks at data before training"), ({}, "must have a name")],
)
def test_methods_that_cannot_train_here_are_refused(method, message):
    with pytest.raises(vpeft.MethodError, match=message):
        backbone(method=method)


def test_a_missing_mmsegmentation_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mmseg", None)
    monkeypatch.delitem(sys.modules, "vpeft.integrations.mmseg")
    with pytest.raises(vpeft.VpeftError, match=r"vpeft\[seg\]"):
        importlib.import_module("vpeft.integrations.mmseg")


class Whole(nn.Module):
    def __init__(self, method):
        super().__init__()
        self.backbone = backbone(method=method, pyramid="beit")
        self.head = nn.Conv2d(32, 3, 1)


OPTIM = {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 1e-2, "weight_decay": 0.1}}


def test_only_trained_parameters_reach_the_optimiser():
    model = Whole({"name": "vpt_deep", "tokens": 2})
    groups = TrainedOnly(OPTIM, {"head_lr_mult": 10})(model).optimizer.param_groups
    found = {id(p): g for g in groups for p in g["params"]}
    assert found.keys() == {id(p) for p in model.parameters() if p.requires_grad}
    assert sum(len(g["params"]) for g in groups) == len(found)
    wanted = {
        model.head.weight: (0.1, 0.1),
        model.head.bias: (0.1, 0.0),
        model.backbone.maps.pyramid.upsample_2x[0].weight: (0.1, 0.1),
        model.backbone.maps.pyramid.upsample_4x[1].weight: (0.1, 0.0),
        next(p for p in model.backbone.handle.parameters()): (0.01, 0.0),  # prompts, although they are no vectors
    }
    for parameter, (lr, decay) in wanted.items():
        assert found[id(parameter)]["lr"] == pytest.approx(lr)
        assert found[id(parameter)]["weight_decay"] == decay
    with pytest.raises(vpeft.VpeftError, match="paramwise_cfg may have head_lr_mult"):
        TrainedOnly(OPTIM, {"custom_keys": {}})
    with pytest.raises(vpeft.VpeftError, match="lr="):
        TrainedOnly({"optimizer": {"type": "AdamW"}})


def test_penalty_and_what_follows_a_step_are_the_optimisers_business(monkeypatch):
    model = Whole({"name": "lora", "rank": 2})
    handle = model.backbone.handle
    monkeypatch.setattr(type(handle.method), "penalty", lambda self, h: sum((p**2).sum() for p in h.parameters()))
    steps = []
    monkeypatch.setattr(type(handle.method), "after_step", lambda self, h: steps.append(h.name))
    wrapper = TrainedOnly({"optimizer": {"type": "SGD", "lr": 0.1}})(model)
    before = [p.detach().clone() for p in handle.parameters()]
    wrapper.update_params(model.head.weight.sum() + sum(3 * p.sum() for p in handle.parameters()))
    assert steps == ["lora"]
    for p, was in zip(handle.parameters(), before, strict=True):
        assert torch.allclose(p, was - 0.1 * (3 + 2 * was), atol=1e-6)


# ---- mmsegmentation's heads ----

BN = {"type": "BN"}
ALL = {"in_channels": [32] * 4, "in_index": [0, 1, 2, 3]}
ONE = {"in_channels": 32, "in_index": 3}
HEADS = {
    "FCNHead": (None, ONE | {"channels": 8, "num_convs": 1}),
    "PSPHead": (None, ONE | {"channels": 8, "pool_scales": (1, 2)}),
    "UPerHead": ("beit", ALL | {"channels": 8, "pool_scales": (1, 2)}),
    "SETRUPHead": (None, ONE | {"channels": 8, "num_convs": 4, "up_scale": 2, "kernel_size": 3}),
    "SETRMLAHead": (None, ALL | {"channels": 16, "mla_channels": 4, "up_scale": 4}),
    "SegmenterMaskTransformerHead": (
        None,
        ONE | {"channels": 32, "num_layers": 1, "num_heads": 2, "embed_dims": 32, "norm_cfg": {"type": "LN"}},
    ),
    "SegformerHead": ("feature2pyramid", ALL | {"channels": 8}),
    "DPTHead": (
        None,
        ALL | {"input_transform": "multiple_select", "channels": 8, "embed_dims": 32, "post_process_channels": (4, 4, 8, 8)},
    ),
}


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_trains_on_the_maps(kind):
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

    pyramid, options = HEADS[kind]
    model = backbone(method={"name": "lora", "rank": 2}, pyramid=pyramid, class_token=kind == "DPTHead").train()
    head = MODELS.build({"type": kind, "num_classes": 3, "norm_cfg": BN, "dropout_ratio": 0.0} | options).train()
    samples = []
    for _ in range(2):
        sample = SegDataSample(gt_sem_seg=PixelData(data=torch.randint(3, (1, 32, 32))))
        sample.set_metainfo({"img_shape": (32, 32)})
        samples.append(sample)
    found = head.loss(model(torch.randn(2, 3, 32, 32)), samples, {})
    found["loss_ce"].backward()
    assert all(p.grad is not None for p in head.parameters() if p.requires_grad)
    assert any(p.grad.any() for p in model.handle.parameters())
    if pyramid:
        assert all(p.grad is not None and p.grad.any() for p in model.maps.pyramid.upsample_2x.parameters())


# ---- a whole run ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = scenes(tmp_path_factory.mktemp("scenes"))
    work = tmp_path_factory.mktemp("whole")
    return root, work, run(root, work)


@pytest.mark.parametrize(
    "stop", [pytest.param(3, marks=pytest.mark.slow), 5]
)  # the second after a validation, which draws random numbers
def test_a_resumed_run_ends_as_an_uninterrupted_one(finished, tmp_path, stop):
    root, _, whole = finished
    run(root, tmp_path, stop=stop)
    assert f"iter_{stop - 1}.safetensors" in {p.name for p in tmp_path.glob("*.safetensors")}
    assert (tmp_path / "state.safetensors").is_file()
    resumed = run(root, tmp_path, resume=True)
    assert resumed.iter == 6
    assert same(whole, resumed)
    ours, theirs = (r.optim_wrapper.state_dict() for r in (whole, resumed))
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["base_param_settings"]["lr"] == theirs["base_param_settings"]["lr"]
    for index, entry in ours["state"].items():
        assert all(torch.equal(v, theirs["state"][index][k]) for k, v in entry.items())
    assert [s.state_dict() for s in whole.param_schedulers] == [s.state_dict() for s in resumed.param_schedulers]
    assert {p.name for p in tmp_path.glob("iter_*")} == {"iter_4.safetensors", "iter_6.safetensors"}
    assert not list(tmp_path.glob(".*"))


def by_epoch(cfg):
    cfg.train_cfg = {"type": "EpochBasedTrainLoop", "max_epochs": 3, "val_interval": 1}
    cfg.train_dataloader.sampler = {"type": "DefaultSampler", "shuffle": True}
    cfg.param_scheduler = [{"type": "PolyLR", "power": 1.0, "begin": 0, "end": 3, "eta_min": 0, "by_epoch": True}]
    cfg.default_hooks.checkpoint.interval = 1


@pytest.mark.slow
def test_epochs_are_continued_too(finished, tmp_path):
    root, _, _ = finished
    whole = run(root, tmp_path / "a", change=by_epoch)
    run(root, tmp_path / "b", stop=5, change=by_epoch)  # two batches an epoch: in the third
    assert same(whole, run(root, tmp_path / "b", change=by_epoch, resume=True))


@pytest.mark.slow
def test_without_resume_a_run_starts_anew(finished, tmp_path):
    root, _, whole = finished
    run(root, tmp_path, stop=3)
    again = run(root, tmp_path)
    assert same(whole, again)
    with pytest.raises(vpeft.CheckpointError, match="weights alone"):
        run(root, tmp_path / "c", resume=True, load_from=str(tmp_path / "iter_4.safetensors"))
    with pytest.raises(vpeft.CheckpointError, match="own files"):
        run(root, tmp_path / "c", resume=True, load_from="somebodys.pth")


def accumulate(cfg):
    cfg.optim_wrapper.accumulative_counts = 4


def test_no_half_accumulated_gradient_is_saved(finished, tmp_path):
    with pytest.raises(vpeft.VpeftError, match="every 4 iterations"):
        run(finished[0], tmp_path, change=accumulate)


def test_trained_weights_are_what_the_runner_tests(finished, tmp_path):
    root, work, whole = finished
    cfg = config(root, tmp_path, load_from=str(work / "iter_6.safetensors"))
    cfg.test_dataloader, cfg.test_evaluator, cfg.test_cfg = cfg.val_dataloader, cfg.val_evaluator, {"type": "TestLoop"}
    tester = runner_of(cfg)
    measured = tester.test()
    assert same(whole, tester)
    assert measured["mIoU"] == whole.val()["mIoU"]


def test_only_what_was_trained_is_written(finished):
    root, work, runner = finished
    assert not [p for p in work.rglob("*") if p.suffix in (".pth", ".pkl", ".pt")]
    own = sum(t.numel() * t.element_size() for t in trained_tensors(runner.model).values())
    assert (work / "iter_6.safetensors").stat().st_size < own + 20_000
    names = set(load_file(work / "iter_6.safetensors"))
    assert "model/decode_head.bottleneck.bn.running_mean" in names
    assert not [n for n in names if "maps.backbone" in n]
    from mmseg.registry import MODELS

    torch.manual_seed(3)
    fresh = MODELS.build(config(root, work).model)
    with pytest.raises(vpeft.CheckpointError, match="other frozen weights"):
        load_trained(fresh, work / "iter_6.safetensors")
    old = {k: v for k, v in runner.model.backbone.timm.state_dict().items() if not k.startswith("vpeft.")}
    fresh.backbone.timm.load_state_dict(old, strict=False)
    load_trained(fresh, work / "iter_6.safetensors")
    x = torch.randn(1, 3, 32, 32)
    found, wanted = (m.eval()(x, mode="tensor") for m in (fresh, runner.model))
    assert torch.equal(found, wanted)


def test_foreign_and_damaged_files_are_refused(finished, tmp_path):
    root, work, _ = finished
    file = work / "iter_6.safetensors"
    other = config(root, work).model
    other.backbone.method = {"name": "bitfit"}
    from mmseg.registry import MODELS

    model = MODELS.build(other)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(vpeft.CheckpointError, match="not of this configuration"):
        load_trained(model, file)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(vpeft.CheckpointError, match="damaged"):
        load_trained(model, cut)
    vpeft.attach(backbone().timm, "lora").save(tmp_path / "own.safetensors")
    with pytest.raises(vpeft.CheckpointError, match=r"no file of vpeft\.SaveTrained"):
        load_trained(model, tmp_path / "own.safetensors")
    tensors, same_model = load_file(file), MODELS.build(config(root, work).model)
    odd, norm = tmp_path / "odd.safetensors", "model/decode_head.bottleneck.bn.running_mean"
    before = {n: t.clone() for n, t in same_model.state_dict().items()}
    good = '{"format": "vpeft.mmseg.2", "backbones": {}}'
    for text, changed, match in (
        ("[]", tensors, "no file of"), ("{", tensors, "no JSON"), ('{"format": "vpeft.mmseg.2"}', tensors, "backbones is missing"),
        (good, tensors | {norm: tensors[norm].bool()}, "running_mean: type torch.bool"),
    ):  # fmt: skip
        save_file(changed, odd, {"vpeft": text})
        with pytest.raises(vpeft.CheckpointError, match=match) as raised:
            load_trained(same_model, odd)
        assert str(odd) in str(raised.value)
    assert all(torch.equal(before[n], t) for n, t in same_model.state_dict().items())


def test_every_pixel_of_a_window_counts_once_as_in_mmsegmentation(finished):
    """Our sliding windows against mmsegmentation's own."""
    from vpeft.tasks.segmentation.step import SegmentationStep

    _, _, runner = finished
    model = runner.model.eval()
    x = torch.randn(1, 3, 37, 50)
    meta = [{"ori_shape": (37, 50), "img_shape": (37, 50), "pad_shape": (37, 50)}]
    with torch.no_grad():
        theirs = model.slide_inference(x, meta)

        class Ours(nn.Module):
            def semantic(self, images):
                return F.interpolate(model(images, mode="tensor"), images.shape[-2:], mode="bilinear", align_corners=False)

        ours = SegmentationStep(3, crop=32, stride=20).scores(Ours(), x)
    assert torch.allclose(ours, theirs, atol=1e-5)


# ---- the examples in configs/ ----


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(f, id=f.stem, marks=() if "scenes" in f.stem else pytest.mark.slow)
        for f in sorted(EXAMPLES.glob("*.py"))
    ],
)
def test_examples_are_complete(file):
    """Each builds a segmentor (of random weights, small images), whose maps the heads take, and an optimiser."""
    from mmengine.config import Config
    from mmengine.registry import HOOKS, OPTIM_WRAPPER_CONSTRUCTORS
    from mmseg.registry import MODELS

    cfg = Config.fromfile(file)
    if "vpeft" not in cfg.model.backbone.model:  # ours is embedded
        cfg.model.backbone.update(pretrained=False, img_size=224)
    for head in ("decode_head", "auxiliary_head"):
        if head in cfg.model:
            cfg.model[head].norm_cfg = {"type": "BN"}  # SyncBN is for GPUs
    model = MODELS.build({**cfg.model, "_scope_": "mmseg"}).eval()
    side = cfg.model.backbone.img_size
    with torch.no_grad():
        assert model(torch.randn(1, 3, side, side), mode="tensor").shape[1] == cfg.model.decode_head.num_classes
        height, width = side // 4 + 1, 5 * (side // 4) + 3  # odd, smaller than the crop, wider than 4:1
        sizes = [{"img_shape": (height, width), "ori_shape": (height, width), "pad_shape": (height, width)}]
        found = model.inference(torch.randn(1, 3, height, width), sizes)
        assert found.shape == (1, cfg.model.decode_head.num_classes, height, width)
    assert type(HOOKS.build(cfg.default_hooks.checkpoint)).__name__ == "SaveTrained"
    wrapper = dict(cfg.optim_wrapper)
    kind = wrapper.pop("constructor", "DefaultOptimWrapperConstructor")
    build = {"type": kind, "optim_wrapper_cfg": wrapper, "paramwise_cfg": wrapper.pop("paramwise_cfg", None)}
    groups = OPTIM_WRAPPER_CONSTRUCTORS.build(build)(model).optimizer.param_groups
    found = {id(p) for g in groups for p in g["params"]}
    assert {id(p) for p in model.parameters() if p.requires_grad} <= found
