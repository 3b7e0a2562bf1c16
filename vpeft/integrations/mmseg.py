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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..backbone.modules import CONTAINER
from ..checkpoint import fingerprint, read_tensors
from ..errors import CheckpointError, MethodError, VpeftError
from ..tasks.segmentation.features import FeatureMaps
from ..tasks.segmentation.mmcv_ops import install
from ..tuning.attach import attach
from ..tuning.handle import Handle

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mmcv-lite warns of every operator that it lacks
        install()
        import mmseg.models  # noqa: F401 - fills the registries
    from mmengine.dist import all_gather_object, get_rank, get_world_size, is_main_process
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
FORMAT = "vpeft.mmseg.2"
STATE = "state.safetensors"
MODEL, OPTIMIZER = "model/", "optimizer/"


# ---- the backbone ----


@VPEFT_MODELS.register_module()
class TimmBackbone(BaseModule):
    """A timm ViT or Swin with a method attached, as a backbone of mmsegmentation.

    What is frozen stays in eval mode in training: no dropout, no drop path. The pyramid and the norms of the maps train
    with the decode head.

    Args:
        model: timm's name.
        pretrained: load timm's weights.
        img_size: side of the training crop, for models whose position embedding depends on it.
        method: ``dict(name=…, **hyper_parameters)``; None freezes the whole model.
        out_indices, pyramid, norm, pyramid_norm, class_token: see ``vpeft.tasks.features.FeatureMaps``.
        model_kwargs: more keywords of ``timm.create_model``.

    Raises:
        MethodError: a method without use for feature maps, or one that has to look at data first.
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
        model_kwargs: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        size = {} if img_size is None else {"img_size": img_size}
        model = timm.create_model(model, pretrained=pretrained, num_classes=0, **size, **(model_kwargs or {}))
        model.requires_grad_(False)
        # No child of this module itself: mmengine calls init_weights of all children, and timm's overwrites what is loaded.
        self.maps = FeatureMaps(model, out_indices, pyramid, norm, pyramid_norm, class_token)
        if method is not None:
            options = dict(method)
            if "name" not in options:
                raise MethodError(f"method: {options} must have a name, as in dict(name='lora', rank=8)")
            handle = attach(model, options.pop("name"), heads=self.maps.heads, **options)
            self.maps.check(handle)
            if handle.method.needs_calibration:
                raise MethodError(
                    f"{handle.method.name} looks at data before training, for which mmengine has no place: train it "
                    "with vpeft's own engine (task: segmentation)"
                )

    @property
    def timm(self) -> nn.Module:
        """The timm model inside."""
        return self.maps.backbone

    @property
    def handle(self) -> Handle | None:
        """The attached method."""
        container = getattr(self.timm, CONTAINER, None)
        return None if container is None else Handle(self.timm, next(iter(container._modules)))

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Training mode for the method, the pyramid and the norms of the maps; the frozen model stays in eval mode."""
        super().train(mode)
        self.timm.eval()
        if self.handle is not None:
            self.handle.root.train(mode)
        return self

    def forward(self, x: Tensor) -> tuple:
        """Images (B, 3, H, W) to maps (B, C, h, w), fine to coarse."""
        return self.maps(x)


def _backbones(model: nn.Module) -> Iterator[tuple[str, TimmBackbone]]:
    for path, module in model.named_modules():
        if isinstance(module, TimmBackbone):
            yield f"{path}." if path else "", module


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A segmentor's tensors without those that are frozen.

    The attached method's are named ``backbone.method.…``, with the names of ``Handle.state_dict`` behind; all others, the
    heads' buffers among them, as in the model.
    """
    state = model.state_dict()
    for path, backbone in _backbones(model):
        state = {n: t for n, t in state.items() if not n.startswith(f"{path}maps.backbone.")}
        if backbone.handle is not None:
            state |= {f"{path}method.{n}": t for n, t in backbone.handle.state_dict().items()}
    return state


def _fingerprints(model: nn.Module) -> dict[str, str]:
    """Of the frozen weights."""
    return {
        path: fingerprint(b.timm, b.handle.state_dict() if b.handle is not None else ()) for path, b in _backbones(model)
    }


# ---- files ----


def load_trained(model: nn.Module, file: str | Path) -> nn.Module:
    """Put the tensors of a file that ``SaveTrained`` wrote into a segmentor of the same configuration.

    Raises:
        CheckpointError: damaged or foreign, of another configuration, or trained on other frozen weights; the model is then
            as it was.
    """
    tensors, about = _read(Path(file))
    _put(model, tensors, about, Path(file))
    return model


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    header, tensors = read_tensors(file)
    about = json.loads(header.get("vpeft", "{}"))
    if about.get("format") != FORMAT:
        raise CheckpointError(f"{file} is no file of vpeft.SaveTrained")
    return tensors, about


def _write(file: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    whole = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    try:
        save_file(whole, temporary, {"vpeft": json.dumps(about, default=_number)})
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _number(value: Any) -> Any:
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0):
        return value.item()
    raise VpeftError(f"SaveTrained: cannot write a {type(value).__name__} of the optimiser's or scheduler's state")


@torch.no_grad()
def _put(model: nn.Module, tensors: dict[str, Tensor], about: dict[str, Any], file: Path) -> None:
    values = {n.removeprefix(MODEL): t for n, t in tensors.items() if n.startswith(MODEL)}
    own = trained_tensors(model)
    methods = {f"{path}method.": b.handle for path, b in _backbones(model) if b.handle is not None}
    if own.keys() != values.keys():
        missing, unknown = sorted(own.keys() - values.keys()), sorted(values.keys() - own.keys())
        raise CheckpointError(f"{file}: not of this configuration: lacks {missing[:3]}, has unknown {unknown[:3]}")
    plain = {n: t for n, t in values.items() if not n.startswith(tuple(methods))}
    for name, value in plain.items():
        if own[name].shape != value.shape:
            raise CheckpointError(f"{file}: {name} is {tuple(value.shape)}, here {tuple(own[name].shape)}")
    if about["backbones"] != _fingerprints(model):
        raise CheckpointError(f"{file}: trained on other frozen weights than this backbone's")
    for prefix, handle in methods.items():
        handle.load_state_dict({n.removeprefix(prefix): t for n, t in values.items() if n.startswith(prefix)})
    for name, value in plain.items():
        own[name].copy_(value)


# ---- saving and resuming ----


@VPEFT_HOOKS.register_module()
class SaveTrained(Hook):
    """In place of mmengine's CheckpointHook: writes what was trained, and continues an interrupted run exactly.

    ``WORK_DIR/iter_N.safetensors`` holds the trained tensors alone, for ``load_trained``; ``WORK_DIR/state.safetensors``
    also holds the optimiser, the schedules and the random states, and is written after it. Both appear whole or not at all,
    and no pickle is read.

    The Runner's own ``resume=True`` (``--resume`` of mmsegmentation's ``tools/train.py``) continues from the work folder's
    state, or from the state that ``load_from`` names. Iteration-based loops pass the batches that were trained on already,
    and end with the weights of an uninterrupted run. ``load_from`` of an ``iter_N.safetensors`` without ``resume`` starts
    from, or tests, these weights.

    Args:
        interval: iterations (in epoch-based loops epochs) between saves; the end is always saved.
        keep: how many ``iter_N`` files remain.
        resume: as the Runner's ``resume``, for where that cannot be set.
    """

    priority = "VERY_LOW"

    def __init__(self, interval: int = 1000, keep: int = 2, resume: bool = False):
        if interval < 1 or keep < 1:
            raise VpeftError(f"SaveTrained: interval={interval} and keep={keep} must be at least 1")
        self.interval, self.keep, self.resume = interval, keep, resume
        self._from: Path | None = None
        self._saved = -1
        self._frozen: dict[str, str] = {}

    # ---- when ----

    def before_run(self, runner) -> None:
        """Take over what the Runner would load, since its own way reads pickles."""
        self.resume = self.resume or runner._resume
        given = Path(runner._load_from) if runner._load_from else None
        if self.resume and given is None and (Path(runner.work_dir) / STATE).is_file():
            given = Path(runner.work_dir) / STATE
        if given is not None and given.suffix != ".safetensors":
            if self.resume:
                raise CheckpointError(f"{given}: SaveTrained continues from its own files only ({STATE})")
            return  # weights of another library's, which torch.load reads without unpickling code
        if self.resume and given is None:
            runner.logger.info("nothing to continue from in %s", runner.work_dir)
        runner._has_loaded = runner._has_loaded or self.resume or given is not None
        self._from = given

    def before_train(self, runner) -> None:
        # Not earlier: the Runner initialises weights after before_run.
        counts = getattr(runner.optim_wrapper, "_accumulative_counts", 1)
        if self.interval % counts and not self._by_epoch(runner):
            raise VpeftError(
                f"SaveTrained: interval={self.interval} would save between two steps of an optimiser that steps every "
                f"{counts} iterations; make it a multiple"
            )
        self._frozen = _fingerprints(_bare(runner.model))
        file, self._from = self._from, None
        if file is None:
            return
        if self.resume:
            self._restore(runner, file)
        else:
            load_trained(_bare(runner.model), file)

    def before_val(self, runner) -> None:
        file, self._from = self._from, None
        if file is not None:
            load_trained(_bare(runner.model), file)

    before_test = before_val

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        done = runner.iter + 1
        if not self._by_epoch(runner) and self._due(done, runner.max_iters):
            self._save(runner, done, runner.epoch)

    def after_train_epoch(self, runner) -> None:
        if self._by_epoch(runner) and self._due(runner.epoch + 1, runner.max_epochs):
            self._save(runner, runner.iter, runner.epoch + 1)

    def after_val(self, runner) -> None:
        # A validation draws random numbers too, and is not repeated after an interruption.
        if self._saved == runner.iter and runner.iter < runner.max_iters:
            self._save_state(runner, runner.iter, runner.epoch)

    def _due(self, done: int, last: int) -> bool:
        return done % self.interval == 0 or done == last

    @staticmethod
    def _by_epoch(runner) -> bool:
        return hasattr(runner.train_loop, "run_epoch")

    # ---- what ----

    def _save(self, runner, iteration: int, epoch: int) -> None:
        folder = Path(runner.work_dir)
        if is_main_process():
            trained = {f"{MODEL}{n}": t for n, t in trained_tensors(_bare(runner.model)).items()}
            about = {"format": FORMAT, "iter": iteration, "epoch": epoch, "backbones": self._frozen}
            _write(folder / f"iter_{iteration}.safetensors", trained, about)
            files = sorted(folder.glob("iter_*.safetensors"), key=lambda p: int(re.findall(r"\d+", p.stem)[0]))
            for old in [f for f in files if f.stem != f"iter_{iteration}"][: -self.keep + 1 or None]:
                old.unlink()
        self._save_state(runner, iteration, epoch)
        self._saved = iteration

    def _save_state(self, runner, iteration: int, epoch: int) -> None:
        states = all_gather_object(_random_states())
        if not is_main_process():
            return
        tensors = {f"{MODEL}{n}": t for n, t in trained_tensors(_bare(runner.model)).items()}
        wrapper = runner.optim_wrapper.state_dict()
        scalars: dict[str, dict] = {}
        for index, entries in wrapper["state"].items():
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"{OPTIMIZER}{index}/{key}"] = value
                else:
                    scalars.setdefault(str(index), {})[key] = value
        base = wrapper.get("base_param_settings")
        about = {
            "format": FORMAT, "iter": iteration, "epoch": epoch, "backbones": self._frozen, "scalars": scalars,
            "groups": wrapper["param_groups"], "scaler": wrapper.get("loss_scaler"), "random": states,
            "base": base and {k: v for k, v in base.items() if k != "params"},
            "schedulers": [s.state_dict() for s in runner.param_schedulers or []],
        }  # fmt: skip
        _write(Path(runner.work_dir) / STATE, tensors, about)

    def _restore(self, runner, file: Path) -> None:
        tensors, about = _read(file)
        if "random" not in about:
            raise CheckpointError(f"{file} holds weights alone; a run continues from {STATE}")
        if len(about["random"]) != get_world_size():
            raise CheckpointError(f"{file}: written by {len(about['random'])} processes, here are {get_world_size()}")
        _put(_bare(runner.model), tensors, about, file)
        self._restore_optimizer(runner, tensors, about)
        loop = runner.train_loop
        loop._iter, loop._epoch = about["iter"], about["epoch"]
        runner.optim_wrapper.initialize_count_status(runner.model, loop.iter, loop.max_iters)
        states = about["random"][get_rank()]
        if self._by_epoch(runner) or not about["iter"]:
            _restore_random(states)
        else:
            loop.dataloader_iterator = _Passing(loop.dataloader_iterator, about["iter"], states)
        runner.logger.info("continues after iteration %d, from %s", about["iter"], file)

    @staticmethod
    def _restore_optimizer(runner, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        state: dict[int, dict] = {int(i): dict(v) for i, v in about["scalars"].items()}
        for name, value in tensors.items():
            if name.startswith(OPTIMIZER):
                _, index, key = name.split("/")
                state.setdefault(int(index), {})[key] = value
        # JSON has no tuples (betas).
        groups = [
            {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in g.items()} for g in about["groups"]
        ]
        wrapper = {"state": state, "param_groups": groups}
        if about["scaler"] is not None:
            wrapper["loss_scaler"] = about["scaler"]
        schedulers = runner.param_schedulers or []
        try:
            runner.optim_wrapper.load_state_dict(wrapper)
            for scheduler, values in zip(schedulers, about["schedulers"], strict=True):
                scheduler.load_state_dict(values)
        except ValueError as error:
            raise CheckpointError(f"the optimiser or the schedule is not the one that was saved: {error}") from error
        base = runner.optim_wrapper.base_param_settings
        if base is not None:
            base.update(about["base"] or {})


def _bare(model: nn.Module) -> nn.Module:
    """Without what wraps it for several processes."""
    return getattr(model, "module", model)


class _Passing:
    """A loader's iterator that puts the random states back when the batches of the first part have gone by."""

    def __init__(self, batches: Iterator, count: int, states: dict[str, Any]):
        self.batches, self.left, self.states = batches, count, states

    def __iter__(self) -> "_Passing":
        return self

    def __next__(self) -> Any:
        batch = next(self.batches)
        if self.left:
            self.left -= 1
            if not self.left:
                _restore_random(self.states)
        return batch


def _random_states() -> dict[str, Any]:
    """Python's, numpy's and torch's, as lists of numbers."""
    kind, keys, *rest = np.random.get_state()
    devices = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "cuda": [torch.cuda.get_rng_state(i).tolist() for i in range(devices)],
    }


def _restore_random(states: dict[str, Any]) -> None:
    version, inside, gauss = states["python"]
    random.setstate((version, tuple(inside), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    for index, state in enumerate(states["cuda"]):
        torch.cuda.set_rng_state(torch.tensor(state, dtype=torch.uint8), index)


# ---- the optimiser ----


@VPEFT_CONSTRUCTORS.register_module()
class TrainedOnly:
    """Gives an optimiser the trained parameters alone: the method's by ``Handle.param_groups``, and the heads'.

    Weight decay leaves vectors and numbers alone, and what the method or timm exempts. A method's penalty joins the
    gradients before each step, after any clipping, and what a method does after a step is done.

    Args:
        optim_wrapper_cfg: mmengine's, with ``optimizer``.
        paramwise_cfg: ``dict(head_lr_mult=…)``, a factor for the learning rate of all that is not the method.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        self.wrapper, options = dict(optim_wrapper_cfg), dict(paramwise_cfg or {})
        self.head_lr_mult = options.pop("head_lr_mult", 1.0)
        if options:
            raise VpeftError(f"TrainedOnly: unknown {sorted(options)}; paramwise_cfg may have head_lr_mult")
        if "lr" not in self.wrapper.get("optimizer", {}):
            raise VpeftError("TrainedOnly: optim_wrapper must have optimizer=dict(type=…, lr=…)")

    def __call__(self, model: nn.Module) -> Any:
        wrapper = dict(self.wrapper)
        optimizer = dict(wrapper.pop("optimizer"))
        lr, decay = optimizer["lr"], optimizer.get("weight_decay", 0.0)
        model = _bare(model)
        handles = [b.handle for _, b in _backbones(model) if b.handle is not None]
        groups = [g for h in handles for g in h.param_groups(lr, decay, lr * self.head_lr_mult)]
        seen = {id(p) for group in groups for p in group["params"]}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in seen]
        for decayed in (True, False):
            params = [p for p in rest if (p.ndim > 1) == decayed]
            if params:
                rates = {"lr": lr * self.head_lr_mult, "weight_decay": decay if decayed else 0.0}
                groups.append({"params": params, "name": "head", **rates})
        if not groups:
            raise VpeftError("nothing to train: the method trains no tensor and the model has no head")
        optimizer["params"] = groups
        wrapper["optimizer"] = OPTIMIZERS.build(optimizer)
        for handle in handles:
            wrapper["optimizer"].register_step_pre_hook(partial(_add_penalty, handle))
            wrapper["optimizer"].register_step_post_hook(partial(_after_step, handle))
        return OPTIM_WRAPPERS.build({"type": "OptimWrapper", **wrapper})


def _add_penalty(handle: Handle, *_: Any) -> None:
    with torch.enable_grad():
        penalty = handle.penalty()
    if penalty.requires_grad:
        params = [p for p in handle.parameters() if p.requires_grad]
        # Not backward(): hooks of distributed training must not see it.
        for p, g in zip(params, torch.autograd.grad(penalty, params, allow_unused=True), strict=True):
            if g is not None:
                p.grad = g if p.grad is None else p.grad + g


def _after_step(handle: Handle, *_: Any) -> None:
    handle.after_step()
