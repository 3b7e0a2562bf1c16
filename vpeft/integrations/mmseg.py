"""mmsegmentation 1.2 on current torch, without compiled mmcv, and adapted timm models as its backbones.

Importing this module makes ``mmseg.models`` importable and registers, under mmengine's scope ``vpeft``:

- ``vpeft.TimmBackbone``, a timm model with a method attached;
- ``vpeft.SaveTrained``, a hook that saves what was trained and resumes from it;
- ``vpeft.TrainedOnly``, an optimiser constructor that takes the trained parameters alone.

An ordinary mmsegmentation configuration needs ``custom_imports = dict(imports=["vpeft.integrations.mmseg"])`` and another
``backbone=``.
"""

import json
import os
import random
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..attach import CONTAINER, Handle, attach
from ..errors import CheckpointError, VpeftError
from ..tasks.features import FeatureMaps
from .mmcv_ops import install

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mmcv-lite warns of every operator that it lacks
        install()
        import mmseg.models  # noqa: F401 - fills the registries
    from mmengine.hooks import Hook
    from mmengine.model import BaseModule
    from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS, Registry
except ImportError as error:
    raise VpeftError(f"mmsegmentation is not usable here ({error}); install it with: pip install 'vpeft[seg]'") from error

LOCATIONS = ["vpeft.integrations.mmseg"]
VPEFT_MODELS = Registry("model", parent=MODELS, scope="vpeft", locations=LOCATIONS)
VPEFT_HOOKS = Registry("hook", parent=HOOKS, scope="vpeft", locations=LOCATIONS)
VPEFT_CONSTRUCTORS = Registry(
    "optimizer wrapper constructor", parent=OPTIM_WRAPPER_CONSTRUCTORS, scope="vpeft", locations=LOCATIONS
)
FORMAT = "vpeft.mmseg.1"
STATE = "state.safetensors"


@VPEFT_MODELS.register_module()
class TimmBackbone(BaseModule):
    """A timm ViT or Swin with a method attached, as a backbone of mmsegmentation.

    Args:
        model: timm's name.
        pretrained: load timm's weights.
        img_size: side of the training crop, for models whose position embedding depends on it.
        method: ``dict(name=…, **hyper_parameters)``; None freezes the whole model.
        out_indices, pyramid, norm, pyramid_norm: see ``vpeft.tasks.features.FeatureMaps``.
        class_token: give (map, class token) pairs, as DPT's head wants them.
        checkpoint: a local weight file in place of timm's own.
        drop_path: rate of stochastic depth; the frozen model is in training mode only where it is above 0.
        model_kwargs: more keywords of ``timm.create_model``.
    """

    def __init__(
        self,
        model: str,
        pretrained: bool = True,
        img_size: int | None = None,
        method: Mapping[str, Any] | None = None,
        out_indices: Sequence[int] = (2, 5, 8, 11),
        pyramid: str | None = None,
        norm: str | None = None,
        pyramid_norm: str = "batch",
        class_token: bool = False,
        checkpoint: str | None = None,
        drop_path: float = 0.0,
        model_kwargs: Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = None,
    ):
        super().__init__(init_cfg)
        kwargs = dict(model_kwargs or {})
        if img_size:
            kwargs["img_size"] = img_size
        if drop_path:
            kwargs["drop_path_rate"] = drop_path
        if checkpoint:
            kwargs["pretrained_cfg_overlay"] = {"file": checkpoint}
        self.timm = timm.create_model(model, pretrained=pretrained or bool(checkpoint), num_classes=0, **kwargs)
        self.drops = drop_path > 0
        self.maps = FeatureMaps(self.timm, out_indices, pyramid, norm, pyramid_norm, class_token)
        self.timm.requires_grad_(False)
        if method is not None:
            options = dict(method)
            self.maps.check(attach(self.timm, options.pop("name"), **options))

    @property
    def handle(self) -> Handle | None:
        """The attached method."""
        container = getattr(self.timm, CONTAINER, None)
        return None if container is None else Handle(self.timm, next(iter(container._modules)))

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Training mode for the method and the pyramid; the frozen model stays in eval mode unless it has drop path."""
        super().train(mode)
        self.timm.train(mode and self.drops)
        if self.handle is not None:
            self.handle.root.train(mode)
        return self

    def forward(self, x: Tensor) -> tuple:
        """Images (B, 3, H, W) to maps (B, C, h, w), fine to coarse."""
        return self.maps(x)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's state without what is frozen: of a ``TimmBackbone`` the method's tensors and those it trains."""
    state, frozen = model.state_dict(), set()
    for path, module in model.named_modules():
        if isinstance(module, TimmBackbone):
            here = f"{path}." if path else ""
            frozen |= {n for n in state if n.startswith(f"{here}maps.backbone.")}  # a second name of the same tensors
            trained = {f"{here}timm.{n}" for n, p in module.timm.named_parameters() if p.requires_grad}
            inside = {n for n in state if n.startswith(f"{here}timm.")}
            frozen |= {n for n in inside - trained if not n.startswith(f"{here}timm.{CONTAINER}.")}
    return {n: t for n, t in state.items() if n not in frozen}


def load_trained(model: nn.Module, file: str | Path) -> nn.Module:
    """Put the tensors of a file that ``SaveTrained`` wrote into a model of the same configuration.

    Raises:
        CheckpointError: damaged or foreign, or made by another configuration; the model is then as it was.
    """
    tensors, _ = _read(Path(file))
    _put(model, {n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")}, Path(file))
    return model


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist")
    try:
        with safe_open(file, "pt") as f:
            header = f.metadata() or {}
            tensors = {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118 - safe_open is no mapping
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file: {error}") from error
    about = json.loads(header.get("vpeft", "{}"))
    if about.get("format") != FORMAT:
        raise CheckpointError(f"{file} is no file of vpeft.SaveTrained")
    return tensors, about


@torch.no_grad()
def _put(model: nn.Module, values: dict[str, Tensor], file: Path) -> None:
    own = trained_tensors(model)
    if own.keys() != values.keys():
        missing, unknown = sorted(own.keys() - values.keys()), sorted(values.keys() - own.keys())
        raise CheckpointError(f"{file}: not of this configuration: lacks {missing[:3]}, has unknown {unknown[:3]}")
    for name, value in values.items():
        if own[name].shape != value.shape:
            raise CheckpointError(f"{file}: {name} is {tuple(value.shape)}, here {tuple(own[name].shape)}")
    for name, value in values.items():
        own[name].copy_(value)


@VPEFT_HOOKS.register_module()
class SaveTrained(Hook):
    """In place of mmengine's CheckpointHook: writes what was trained, and continues an interrupted run exactly.

    ``WORK_DIR/iter_N.safetensors`` holds the trained tensors alone, for ``load_trained``; ``WORK_DIR/state.safetensors``
    also holds the optimiser, the schedules and the random states, and is written last. Both appear whole or not at all,
    and no pickle is read. With iteration-based loops a resumed run passes the batches that were trained on already, and
    ends with the weights of an uninterrupted one.

    Args:
        interval: iterations (or, in epoch-based loops, epochs) between saves; the end is always saved.
        keep: how many ``iter_N`` files remain.
        resume: continue from the work folder's state where there is one.
    """

    priority = "VERY_LOW"

    def __init__(self, interval: int = 1000, keep: int = 2, resume: bool = True):
        if interval < 1 or keep < 1:
            raise VpeftError(f"SaveTrained: interval={interval} and keep={keep} must be at least 1")
        self.interval, self.keep, self.resume = interval, keep, resume

    # ---- when ----

    def before_train(self, runner) -> None:
        state = Path(runner.work_dir) / STATE
        if self.resume and state.is_file():
            self._restore(runner, state)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        if not self._by_epoch(runner) and self._due(runner.iter + 1, runner.max_iters):
            self._save(runner, runner.iter + 1, runner.epoch)

    def after_train_epoch(self, runner) -> None:
        if self._by_epoch(runner) and self._due(runner.epoch + 1, runner.max_epochs):
            self._save(runner, runner.iter, runner.epoch + 1)

    def _due(self, done: int, last: int) -> bool:
        return done % self.interval == 0 or done == last

    @staticmethod
    def _by_epoch(runner) -> bool:
        return hasattr(runner.train_loop, "run_epoch")

    # ---- what ----

    def _save(self, runner, iteration: int, epoch: int) -> None:
        from mmengine.dist import is_main_process
        from mmengine.model import is_model_wrapper

        if not is_main_process():
            return
        folder = Path(runner.work_dir)
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        trained = {f"model/{n}": t for n, t in trained_tensors(model).items()}
        about = {"format": FORMAT, "iter": iteration, "epoch": epoch}
        _write(folder / f"iter_{iteration}.safetensors", trained, about)
        tensors, wrapper = dict(trained), runner.optim_wrapper.state_dict()
        scalars: dict[str, dict] = {}
        for index, entries in wrapper["state"].items():
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{index}/{key}"] = value
                else:
                    scalars.setdefault(str(index), {})[key] = value
        about |= {
            "scalars": scalars,
            "groups": wrapper["param_groups"],
            "scaler": wrapper.get("loss_scaler"),
            "schedulers": [s.state_dict() for s in runner.param_schedulers or []],
            "random": _random_states(tensors),
        }
        _write(folder / STATE, tensors, about)
        files = sorted(folder.glob("iter_*.safetensors"), key=lambda p: int(re.findall(r"\d+", p.stem)[0]))
        for old in files[: -self.keep]:
            old.unlink()

    def _restore(self, runner, file: Path) -> None:
        from mmengine.model import is_model_wrapper

        tensors, about = _read(file)
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        _put(model, {n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")}, file)
        state: dict[int, dict] = {int(i): dict(v) for i, v in about["scalars"].items()}
        for name, value in tensors.items():
            if name.startswith("optimizer/"):
                _, index, key = name.split("/")
                state.setdefault(int(index), {})[key] = value
        wrapper = {"state": state, "param_groups": about["groups"]}
        if about["scaler"] is not None:
            wrapper["loss_scaler"] = about["scaler"]
        runner.optim_wrapper.load_state_dict(wrapper)
        for scheduler, values in zip(runner.param_schedulers or [], about["schedulers"], strict=True):
            scheduler.load_state_dict(values)
        loop = runner.train_loop
        loop._iter, loop._epoch = about["iter"], about["epoch"]
        if self._by_epoch(runner):
            _restore_random(tensors, about["random"])
        else:
            loop.dataloader_iterator = _Passing(loop.dataloader_iterator, about["iter"], tensors, about["random"])
        runner.logger.info("continues after iteration %d, from %s", about["iter"], file)


class _Passing:
    """A loader's iterator that puts the random states back when the batches of the first part have gone by."""

    def __init__(self, batches: Iterator, count: int, tensors: dict[str, Tensor], states: dict[str, Any]):
        self.batches, self.left, self.tensors, self.states = batches, count, tensors, states

    def __iter__(self) -> "_Passing":
        return self

    def __next__(self) -> Any:
        batch = next(self.batches)
        if self.left:
            self.left -= 1
            if not self.left:
                _restore_random(self.tensors, self.states)
        return batch


def _random_states(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Python's, numpy's and torch's; large ones go into ``tensors``."""
    kind, keys, *rest = np.random.get_state()
    tensors["random/numpy"] = torch.from_numpy(keys.astype(np.int64))
    tensors["random/torch"] = torch.get_rng_state()
    for index in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        tensors[f"random/cuda{index}"] = torch.cuda.get_rng_state(index)
    return {"python": random.getstate(), "numpy": [kind, *rest]}


def _restore_random(tensors: dict[str, Tensor], states: dict[str, Any]) -> None:
    version, inside, gauss = states["python"]
    random.setstate((version, tuple(inside), gauss))
    kind, *rest = states["numpy"]
    np.random.set_state((kind, tensors["random/numpy"].numpy().astype(np.uint32), *rest))
    torch.set_rng_state(tensors["random/torch"])
    for name, value in tensors.items():
        if name.startswith("random/cuda"):
            torch.cuda.set_rng_state(value, int(name.removeprefix("random/cuda")))


def _write(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    whole = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    save_file(whole, temporary, {"vpeft": json.dumps(about)})
    os.replace(temporary, path)


@VPEFT_CONSTRUCTORS.register_module()
class TrainedOnly:
    """Gives an optimiser the trained parameters alone: the method's by ``Handle.param_groups``, and the heads'.

    Weight decay leaves vectors and numbers alone, and what the method or timm exempts.

    Args:
        optim_wrapper_cfg: mmengine's, with ``optimizer``.
        paramwise_cfg: ``dict(head_lr_mult=…)``, a factor for the learning rate of all that is not the method.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        self.wrapper, self.options = dict(optim_wrapper_cfg), dict(paramwise_cfg or {})
        unknown = set(self.options) - {"head_lr_mult"}
        if unknown:
            raise VpeftError(f"TrainedOnly: unknown {sorted(unknown)}; paramwise_cfg may have head_lr_mult")

    def __call__(self, model: nn.Module) -> Any:
        model = getattr(model, "module", model)
        wrapper = dict(self.wrapper)
        optimizer = dict(wrapper.pop("optimizer"))
        lr, decay = optimizer["lr"], optimizer.get("weight_decay", 0.0)
        groups: list[dict] = []
        for module in model.modules():
            if isinstance(module, TimmBackbone) and module.handle is not None:
                groups += module.handle.param_groups(lr, decay)
        seen = {id(p) for group in groups for p in group["params"]}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in seen]
        for decayed in (True, False):
            params = [p for p in rest if (p.ndim > 1) == decayed]
            if params:
                rate = lr * self.options.get("head_lr_mult", 1.0)
                groups.append({"params": params, "lr": rate, "weight_decay": decay if decayed else 0.0, "name": "head"})
        if not groups:
            raise VpeftError("nothing to train: the method trains no tensor and the model has no head")
        optimizer["params"] = groups
        wrapper["optimizer"] = OPTIMIZERS.build(optimizer)
        return OPTIM_WRAPPERS.build({"type": "OptimWrapper", **wrapper})
