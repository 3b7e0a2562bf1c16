"""``vpeft mmseg-config``: stock configurations of mmsegmentation rewritten, and what comes of them when they are trained."""

import itertools
import logging

import pytest
from mmengine.config import Config

import vpeft
from tests.support.mmseg import KWARGS, config, run, runner_of, same, scenes
from vpeft.cli import main
from vpeft.integrations.mmseg.fitting import as_list
from vpeft.integrations.mmseg.stock import Choice, pairs, read_stock, rewrite, stock_file, write_stock

VIT = ("vit_tiny_patch16_224", KWARGS)
SWIN = (
    "swin_tiny_patch4_window7_224",
    {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "window_size": 4},
)
UPER = "upernet_r50_4xb4-80k_ade20k-512x512.py"


def choice(model=VIT, method="lora", **others):
    return Choice(model[0], method, others.pop("options", {"rank": 2}), pretrained=False, model_kwargs=model[1], **others)


def mine(tmp_path, stock, model=VIT, **options):
    """A stock configuration, rewritten and read again from its file."""
    file = tmp_path / "mine.py"
    write_stock(stock, file, choice(model, **options), overwrite=True)
    return Config.fromfile(file)


def small(tmp_path, stock):
    """A stock configuration for crops of 64 x 64."""
    file = tmp_path / "small.py"
    file.write_text(f"_base_ = '{stock_file(stock)}'\nmodel = dict(data_preprocessor=dict(size=(64, 64)))\n")
    return str(file)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    logging.getLogger("mmengine").setLevel(logging.ERROR)
    return scenes(tmp_path_factory.mktemp("scenes"))


def three_classes(part):
    """All heads for three classes, without weights for others, and batch norms that need no second image."""
    for key, value in list(part.items()):
        if key == "num_classes":
            part[key] = 3
        if key == "class_weight":
            part.pop(key)
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                three_classes(inner)


# Heads whose width depends on nothing else.
FREE = {"ANNHead", "APCHead", "ASPPHead", "DAHead", "DepthwiseSeparableASPPHead", "DMHead", "DNLHead", "EMAHead", "EncHead",
        "GCHead", "ISAHead", "NLHead", "PSPHead", "UPerHead", "SegformerHead"}  # fmt: skip


def narrow(model):
    """Heads of few channels, where they may be."""
    for head in as_list(model.decode_head) + as_list(model.get("auxiliary_head")):
        if head["type"] in FREE or (head["type"] == "FCNHead" and head.get("num_convs") and "input_transform" not in head):
            head["channels"] = min(head["channels"], 32)


def onto(stock):
    """Puts a rewritten configuration's model, optimiser, schedule and hook into the tiny experiment."""

    def change(cfg):
        cfg.model, cfg.optim_wrapper, cfg.param_scheduler = stock.model, stock.optim_wrapper, stock.param_scheduler
        three_classes(cfg.model)
        narrow(cfg.model)
        cfg.optim_wrapper.type = "OptimWrapper"  # AmpOptimWrapper is for GPUs
        cfg.optim_wrapper.pop("loss_scale", None)
        cfg.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": 4, "val_interval": 2}
        cfg.default_hooks.checkpoint = {**stock.default_hooks.checkpoint, "interval": 2}

    return change


def goes_all_the_way(root, tmp_path, stock):
    """Train, validate, test and resume; images are 36 x 40, no multiple of a patch or window."""
    whole = run(root, tmp_path / "whole", change=onto(stock))
    run(root, tmp_path / "cut", stop=3, change=onto(stock))
    assert same(whole, run(root, tmp_path / "cut", change=onto(stock), resume=True))
    best = [p.name for p in (tmp_path / "whole").glob("best_mIoU*")]
    assert len(best) == 1
    cfg = config(root, tmp_path / "test", load_from=str(tmp_path / "whole" / best[0]))
    onto(stock)(cfg)
    cfg.test_dataloader, cfg.test_evaluator, cfg.test_cfg = cfg.val_dataloader, cfg.val_evaluator, {"type": "TestLoop"}
    assert 0 <= runner_of(cfg).test()["mIoU"] <= 100


# ---- a few in the fast suite ----


@pytest.mark.slow
@pytest.mark.parametrize("model", [VIT, SWIN], ids=["vit", "swin"])
def test_a_rewritten_configuration_goes_all_the_way(root, tmp_path, model):
    goes_all_the_way(root, tmp_path, mine(tmp_path, small(tmp_path, UPER), model))


def test_what_is_rewritten(tmp_path):
    old, new = Config.fromfile(stock_file(UPER)), mine(tmp_path, f"mmseg::upernet/{UPER}")
    backbone = new.model.backbone
    assert (backbone.type, backbone.model, backbone.pyramid) == ("vpeft.TimmBackbone", VIT[0], "feature2pyramid")
    assert backbone.method == {"name": "lora", "rank": 2}
    assert tuple(backbone.img_size) == (512, 512)
    assert new.model.pretrained is None
    assert new.model.decode_head.in_channels == [32] * 4
    assert new.model.auxiliary_head.in_channels == 32
    for part in ("decode_head", "auxiliary_head"):
        changed = {"in_channels", "norm_cfg", "in_index"}
        assert {k: v for k, v in new.model[part].items() if k not in changed} == {
            k: v for k, v in old.model[part].items() if k not in changed
        }
    assert "SyncBN" not in new.pretty_text
    assert new.model.data_preprocessor.mean == [127.5] * 3
    assert new.optim_wrapper.constructor == "vpeft.TrainedOnly"
    assert new.param_scheduler[0].eta_min == pytest.approx(old.param_scheduler[0].eta_min * 1e-4 / 0.01)
    assert new.default_hooks.checkpoint == {"type": "vpeft.SaveTrained", "interval": 8000, "save_best": "mIoU"}
    assert new.train_dataloader == old.train_dataloader
    assert "SyncBN" in mine(tmp_path, UPER, sync_bn=True).pretty_text


def test_necks_are_removed_or_fitted(tmp_path):
    beit = mine(tmp_path, "beit-base_upernet_8xb2-160k_ade20k-640x640.py")
    assert beit.model.neck is None
    assert beit.model.backbone.pyramid == "feature2pyramid"
    assert beit.optim_wrapper.constructor == "vpeft.TrainedOnly"  # no layer decay
    fpn = mine(tmp_path, "fpn_r50_4xb2-80k_cityscapes-512x1024.py", SWIN)
    assert fpn.model.neck.in_channels == [16, 32, 64, 128]
    assert fpn.model.decode_head.in_channels == [256] * 4
    assert tuple(fpn.model.backbone.img_size) == (512, 1024)
    mla = mine(tmp_path, "setr_vit-l-mla_8xb1-160k_ade20k-512x512.py")
    assert "pyramid" not in mla.model.backbone
    assert mla.model.neck.in_channels == [32] * 4
    dpt = mine(tmp_path, "dpt_vit-b16_8xb2-160k_ade20k-512x512.py")
    assert dpt.model.backbone.class_token is True
    assert dpt.model.decode_head.embed_dims == 32


def test_a_shipped_name_or_a_file_of_ones_own(tmp_path):
    assert stock_file(UPER) == stock_file(f"mmseg::upernet/{UPER}") == stock_file(UPER.removesuffix(".py"))
    own = tmp_path / "own.py"
    own.write_text(f"_base_ = '{stock_file(UPER)}'\nmodel = dict(decode_head=dict(channels=8))\n")
    assert mine(tmp_path, str(own)).model.decode_head.channels == 8


def test_the_command(tmp_path, capsys):
    out = tmp_path / "mine.py"
    options = ["--options", "bottleneck=4", "--out", str(out)]
    main(["mmseg-config", UPER, "--model", "vit_micro_patch4_28.vpeft_fashion", "--method", "adaptformer", *options])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "backbone: ResNetV1c -> vit_micro_patch4_28.vpeft_fashion with adaptformer"
    assert f"written to {out}" in printed[-1]
    cfg = Config.fromfile(out)
    assert cfg.model.backbone.pretrained is True
    assert cfg.model.backbone.method == {"name": "adaptformer", "bottleneck": 4}
    with pytest.raises(SystemExit):
        main(["mmseg-config", UPER, "--model", "vit_micro_patch4_28", "--method", "lora", "--out", str(out)])
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stock", "change", "message"),
    [
        ("ccnet_r50-d8_4xb4-80k_ade20k-512x512.py", {}, "CCHead needs a compiled operator"),
        ("psanet_r50-d8_4xb4-80k_ade20k-512x512.py", {}, "PSAHead needs a compiled operator"),
        ("maskformer_r50-d32_8xb2-160k_ade20k-512x512.py", {}, "MaskFormerHead is built on mmdet"),
        ("mask2former_r50_8xb2-160k_ade20k-512x512.py", {}, "Mask2FormerHead is built on mmdet"),
        ("san-vit-b16_coco-stuff164k-640x640.py", {}, "seg.head: san"),
        ("bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py", {}, "BiSeNetV2 read what it alone gives"),
        ("stdc1_4xb12-80k_cityscapes-512x1024.py", {}, "STDCHead"),
        ("setr_vit-l-mla_8xb1-160k_ade20k-512x512.py", {"model": SWIN}, "MLANeck adds maps of one size.*take a ViT"),
        ("dpt_vit-b16_8xb2-160k_ade20k-512x512.py", {"model": SWIN}, "no class token"),
        ("upernet_r50_4xb4-80k_ade20k-512x51.py", {}, "ships none of that name; did you mean 'upernet_"),
        (UPER, {"model": ("vit_bas_patch16_224", {})}, "timm has no 'vit_bas_patch16_224'; did you mean"),
        (UPER, {"model": ("vit_tiny_patch16_224", {"dept": 3})}, "--model-kwargs: .*dept"),
        (UPER, {"method": "fish", "options": {}}, "looks at data"),
        (UPER, {"method": "vp", "options": {}}, "one size"),
        (UPER, {"lr": -1.0}, "--lr"),
        (UPER, {"lr": float("inf")}, "--lr"),
        (UPER, {"options": {"name": "ssf"}}, "name=ssf is no option of a method; give --method"),
        (UPER, {"model": ("resnet18", {})}, "--model: .*; take a ViT or a Swin"),
    ],
)
def test_what_cannot_be_rewritten_is_said_and_nothing_written(tmp_path, stock, change, message):
    with pytest.raises(vpeft.VpeftError, match=message):
        write_stock(stock, tmp_path / "mine.py", choice(**change))
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_configuration(tmp_path):
    for text, message in (
        ("x = (", "no configuration of mmengine"),
        ("x = 1", "there is no model"),
        ("custom_imports = dict(imports=['nowhere'])\nmodel = dict(type='A')", "custom_imports: .*nowhere"),
    ):
        file = tmp_path / "own.py"
        file.write_text(text)
        with pytest.raises(vpeft.VpeftError, match=message):
            write_stock(str(file), tmp_path / "mine.py", choice())
    with pytest.raises(vpeft.VpeftError, match=r"end in \.py"):
        write_stock(UPER, tmp_path / "mine.yaml", choice())
    with pytest.raises(vpeft.VpeftError, match="the stock configuration itself"):
        write_stock(str(file), file, choice(), overwrite=True)
    for wrong in ("rank", "=3", "a b=1", "a=["):
        with pytest.raises(vpeft.VpeftError, match="--options"):
            pairs("--options", [wrong])
    assert pairs("--options", ["a=1e-3", "b=x", "c=[1, 2]", "d=true", "e="]) == {
        "a": 1e-3,
        "b": "x",
        "c": [1, 2],
        "d": True,
        "e": None,
    }


# ---- all heads that mmsegmentation ships (slow) ----

STOCK = (
    "ann_r50-d8_4xb4-80k_ade20k-512x512", "apcnet_r50-d8_4xb4-80k_ade20k-512x512",
    "beit-base_upernet_8xb2-160k_ade20k-640x640", "convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512",
    "danet_r50-d8_4xb4-80k_ade20k-512x512", "deeplabv3_r50-d8_4xb4-80k_ade20k-512x512",
    "deeplabv3plus_r50-d8_4xb4-80k_ade20k-512x512", "dmnet_r50-d8_4xb4-80k_ade20k-512x512",
    "dnl_r50-d8_4xb4-80k_ade20k-512x512", "dpt_vit-b16_8xb2-160k_ade20k-512x512",
    "emanet_r50-d8_4xb2-80k_cityscapes-512x1024", "encnet_r50-d8_4xb4-80k_ade20k-512x512",
    "fastfcn_r50-d32_jpu_aspp_4xb4-80k_ade20k-512x512", "fastfcn_r50-d32_jpu_enc_4xb4-80k_ade20k-512x512",
    "fastfcn_r50-d32_jpu_psp_4xb4-80k_ade20k-512x512", "fcn_r50-d8_4xb4-80k_ade20k-512x512",
    "gcnet_r50-d8_4xb4-80k_ade20k-512x512", "fcn_hr18_4xb4-80k_ade20k-512x512", "isanet_r50-d8_4xb4-80k_ade20k-512x512",
    "knet-s3_r50-d8_fcn_8xb2-adamw-80k_ade20k-512x512", "knet-s3_r50-d8_upernet_8xb2-adamw-80k_ade20k-512x512",
    "mae-base_upernet_8xb2-amp-160k_ade20k-512x512", "mobilenet-v2-d8_deeplabv3plus_4xb4-160k_ade20k-512x512",
    "nonlocal_r50-d8_4xb4-80k_ade20k-512x512", "ocrnet_hr18_4xb4-80k_ade20k-512x512",
    "ocrnet_r101-d8_4xb2-40k_cityscapes-512x1024", "pointrend_r50_4xb4-160k_ade20k-512x512",
    "fpn_poolformer_s12_8xb4-40k_ade20k-512x512", "pspnet_r50-d8_4xb4-80k_ade20k-512x512",
    "segformer_mit-b0_8xb2-160k_ade20k-512x512", "segmenter_vit-b_mask_8xb1-160k_ade20k-512x512",
    "segmenter_vit-s_fcn_8xb1-160k_ade20k-512x512", "segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512",
    "fpn_r50_4xb4-160k_ade20k-512x512", "setr_vit-l_pup_8xb2-160k_ade20k-512x512", "setr_vit-l_naive_8xb2-160k_ade20k-512x512",
    "setr_vit-l-mla_8xb1-160k_ade20k-512x512", "swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512",
    "twins_svt-s_fpn_fpnhead_8xb4-80k_ade20k-512x512", "upernet_r50_4xb4-80k_ade20k-512x512",
    "vit_vit-b16_mln_upernet_8xb2-160k_ade20k-512x512", "vit_deit-s16_upernet_8xb2-80k_ade20k-512x512",
)  # fmt: skip
VIT_ALONE = ("dpt_", "setr_vit-l-mla")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stock", "model"),
    [(s, m) for s, m in itertools.product(STOCK, (VIT, SWIN)) if m is VIT or not s.startswith(VIT_ALONE)],
    ids=lambda v: v[0].partition("_")[0] if isinstance(v, tuple) else v,
)
def test_every_stock_head_goes_all_the_way(root, tmp_path, stock, model):
    goes_all_the_way(root, tmp_path, mine(tmp_path, small(tmp_path, stock), model))


@pytest.mark.slow
def test_every_shipped_configuration_is_rewritten_or_refused_in_words():
    """All 600, with both backbones, none ending in an error of another kind."""
    seen, refused = set(), {}
    for file in sorted(stock_file(UPER).parents[1].glob("*/*.py")):
        if file.parent.name == "_base_":
            continue
        for model in (VIT, SWIN):
            try:
                cfg = read_stock(file)
                rewrite(cfg, choice(model))
                seen.add(file.name)
                assert cfg.model.backbone.type == "vpeft.TimmBackbone"
            except vpeft.VpeftError as error:
                refused[file.name, model[0]] = str(error)
    assert len(seen) > 400
    words = (
        "compiled operator",
        "mmdet",
        "alone gives",
        "take a ViT",
        "no class token",
        "seg.head: san",
        "cannot be rewritten",
    )
    assert not {k: v for k, v in refused.items() if not any(w in v for w in words)}
