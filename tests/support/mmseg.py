"""A tiny segmentor of mmsegmentation with an adapted ViT, its data, and its Runner."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from vpeft.integrations.mmseg import TimmBackbone, trained_tensors

TINY = {"model": "vit_tiny_patch16_224", "pretrained": False, "img_size": 32}
KWARGS = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}


def backbone(**kwargs):
    torch.manual_seed(0)
    return TimmBackbone(**(TINY | {"model_kwargs": KWARGS, "out_indices": (0, 1, 2, 3)} | kwargs))


def scenes(folder):
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(count):
            mask = np.zeros((36, 40), np.uint8)
            y, x = rng.integers(0, 20, 2)
            mask[y : y + 16, x : x + 16] = 1 + i % 2
            Image.fromarray(rng.integers(0, 50, (36, 40, 3), dtype=np.uint8) + 90 * mask[..., None]).save(
                folder / f"images/{split}/{i}.png"
            )
            Image.fromarray(mask).save(folder / f"masks/{split}/{i}.png")
    return str(folder)


NUMBER = itertools.count()


def config(root, work, iterations=6, **more):
    from mmengine.config import Config

    norm, size = {"type": "BN", "requires_grad": True}, (32, 32)
    loaded = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}]
    train = [*loaded, {"type": "RandomResize", "scale": (40, 36), "ratio_range": (0.9, 1.3), "keep_ratio": True},
             {"type": "RandomCrop", "crop_size": size, "cat_max_ratio": 0.75}, {"type": "RandomFlip", "prob": 0.5},
             {"type": "PhotoMetricDistortion"}, {"type": "PackSegInputs"}]  # fmt: skip
    meta = {"classes": ("none", "a", "b"), "palette": [[0, 0, 0], [255, 0, 0], [0, 255, 0]]}

    def data(split, pipeline):
        prefix = {"img_path": f"images/{split}", "seg_map_path": f"masks/{split}"}
        return {"type": "BaseSegDataset", "data_root": root, "data_prefix": prefix, "metainfo": meta, "pipeline": pipeline,
                "img_suffix": ".png", "seg_map_suffix": ".png"}  # fmt: skip

    return Config({
        "default_scope": "mmseg",
        "custom_imports": {"imports": ["vpeft.integrations.mmseg"]},
        "work_dir": str(work),
        "model": {
            "type": "EncoderDecoder",
            "data_preprocessor": {"type": "SegDataPreProcessor", "mean": [127.5] * 3, "std": [127.5] * 3, "bgr_to_rgb": True,
                                  "pad_val": 0, "seg_pad_val": 255, "size": size},
            "backbone": {"type": "vpeft.TimmBackbone", **TINY, "model_kwargs": KWARGS, "out_indices": (0, 1, 2, 3),
                         "method": {"name": "lora", "rank": 2}, "pyramid": "feature2pyramid"},
            "decode_head": {"type": "UPerHead", "in_channels": [32] * 4, "in_index": [0, 1, 2, 3], "pool_scales": (1, 2),
                            "channels": 8, "dropout_ratio": 0.1, "num_classes": 3, "norm_cfg": norm, "align_corners": False,
                            "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": False}},
            "train_cfg": {}, "test_cfg": {"mode": "slide", "crop_size": size, "stride": (20, 20)},
        },
        "train_dataloader": {"batch_size": 4, "num_workers": 0, "sampler": {"type": "InfiniteSampler", "shuffle": True},
                             "dataset": data("train", train)},
        "val_dataloader": {"batch_size": 1, "num_workers": 0, "sampler": {"type": "DefaultSampler", "shuffle": False},
                           "dataset": data("val", [loaded[0], loaded[1], {"type": "PackSegInputs"}])},
        "val_evaluator": {"type": "IoUMetric", "iou_metrics": ["mIoU"]},
        "train_cfg": {"type": "IterBasedTrainLoop", "max_iters": iterations, "val_interval": 4},
        "val_cfg": {"type": "ValLoop"},
        "optim_wrapper": {"type": "OptimWrapper", "constructor": "vpeft.TrainedOnly",
                          "optimizer": {"type": "AdamW", "lr": 1e-2, "weight_decay": 0.01}},
        "param_scheduler": [{"type": "PolyLR", "power": 1.0, "begin": 0, "end": 8, "eta_min": 0, "by_epoch": False}],
        "default_hooks": {"checkpoint": {"type": "vpeft.SaveTrained", "interval": 2, "keep": 2},
                          "logger": {"type": "LoggerHook", "interval": 10}},
        "randomness": {"seed": 1}, "log_level": "ERROR", "experiment_name": f"{work.name}{next(NUMBER)}", **more,
    })  # fmt: skip


def runner_of(cfg):
    """mmengine's Runner, without looking through the machine's software and printing the configuration, which takes seconds."""
    from mmengine.runner import Runner

    class QuickRunner(Runner):
        def _log_env(self, env_cfg):
            pass

        def dump_config(self):
            pass

    return QuickRunner.from_cfg(cfg)


def run(root, work, stop=None, change=lambda cfg: None, **more):
    cfg = config(root, work, **more)
    change(cfg)
    runner = runner_of(cfg)
    if stop is not None:

        class Killed(Exception):
            pass

        def step(*args, old=runner.model.train_step, **kwargs):
            if runner.iter == stop:
                raise Killed
            return old(*args, **kwargs)

        runner.model.train_step = step
        with pytest.raises(Killed):
            runner.train()
    else:
        runner.train()
    return runner


def same(one, other):
    a, b = trained_tensors(one.model), trained_tensors(other.model)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
