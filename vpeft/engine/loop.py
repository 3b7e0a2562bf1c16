"""The training loop: accelerate for devices and processes, timm for schedules, one state file for exact resume."""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from omegaconf import DictConfig
from safetensors import safe_open
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from ..data.loader import make_loader
from ..data.splits import Datasets
from ..errors import VpeftError
from ..tasks.protocol import Task
from .cache import GB, CachedLoader, CacheError, FeatureCache
from .config import why_no_cache
from .run import RunFolder


class Tuned(Protocol):
    """What the loop needs of whatever is being trained; ``vpeft.attach``'s handle is one."""

    method: Any
    model: nn.Module

    def param_groups(self, lr: float, weight_decay: float, head_lr: float | None = None) -> list[dict]: ...
    def penalty(self) -> Tensor: ...
    def consistency_loss(self, first: Tensor, second: Tensor) -> Tensor: ...
    def after_step(self) -> None: ...
    def head_state_dict(self) -> dict[str, Tensor]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: dict[str, Tensor], strict: bool = True) -> None: ...
    def train(self, mode: bool = True, backbone: bool = False) -> Any: ...
    def save(self, path: Path, **about) -> Any: ...


class Average:
    """Exponential moving average of the trained tensors only (a whole-model copy would double a frozen backbone)."""

    def __init__(self, params: list[Tensor], decay: float):
        self.params, self.decay = params, decay
        self.values = [p.detach().clone() for p in params]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.values, [p.detach() for p in self.params], 1 - self.decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averaged and the running values."""
        for value, param in zip(self.values, self.params, strict=True):
            kept = param.detach().clone()
            param.copy_(value)
            value.copy_(kept)


class Trainer:
    """Trains what ``handle`` holds of ``model`` on ``data``.

    Args:
        config: the experiment.
        model: the whole model, as called in the forward.
        handle: the trained part of it (a vpeft handle).
        data: data sets.
        task: loss and metrics.
        run: the run's folder.
        accelerator: made by ``make_accelerator``.
        about: metadata for every checkpoint.
        recalibrate: called at the start of every epoch but the first.
    """

    def __init__(
        self,
        config: DictConfig,
        model: nn.Module,
        handle: Tuned,
        data: Datasets,
        task: Task,
        run: RunFolder,
        accelerator: Accelerator,
        about: dict | None = None,
        recalibrate: Callable[[], Any] | None = None,
    ):
        self.config, self.handle, self.task, self.run, self.accelerator = config, handle, task, run, accelerator
        self.consistency = handle.consistency_loss if handle.method.consistency_weight else None
        self.data, self.metadata, self.recalibrate = data, about or {}, recalibrate
        rank, world = accelerator.process_index, accelerator.num_processes
        common = {"seed": config.seed, "workers": config.data.workers, "rank": rank, "world": world}
        self.train_loader = make_loader(
            data.train, config.train.batch_size, train=True, drop_last=config.train.drop_last, **common
        )
        self.eval_loaders = {
            split: make_loader(dataset, config.data.batch_size, train=False, **common)
            for split, dataset in (("val", data.val), ("test", data.test))
            if dataset is not None
        }
        groups = handle.param_groups(config.optim.lr, config.optim.weight_decay, head_lr=config.optim.head_lr)
        self.params = [p for g in groups for p in g["params"]]
        if not self.params:
            raise VpeftError("nothing to train: the method trains no tensor and the model has no head")
        optimizer = create_optimizer_v2(
            groups,
            config.optim.name,
            lr=config.optim.lr,
            weight_decay=config.optim.weight_decay,
            momentum=config.optim.momentum,
            **config.optim.kwargs,
        )
        self.whole = model.to(accelerator.device)
        if config.train.compile:
            model = torch.compile(model)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.steps_per_epoch = self._count_steps()
        # What timm calls the decay rate is poly's power there.
        power = {"decay_rate": config.schedule.power} if config.schedule.name == "poly" else {}
        self.scheduler, self.epochs = create_scheduler_v2(
            self.optimizer,
            **power,
            sched=config.schedule.name,
            num_epochs=config.train.epochs,
            warmup_epochs=config.schedule.warmup_epochs,
            warmup_lr=config.schedule.warmup_lr,
            min_lr=config.schedule.min_lr,
            cooldown_epochs=config.schedule.cooldown_epochs,
            step_on_epochs=False,
            updates_per_epoch=self.steps_per_epoch,
        )
        self.average = Average(self.params, config.train.ema) if config.train.ema else None
        self.epoch, self.best = 0, {"epoch": None, "value": -math.inf}
        # Trained tensors that no gradient has reached yet, watched over the first steps.
        self.without_gradient = {name: p for name, p in handle.named_parameters() if p.requires_grad}
        self.steps = 0

    def _count_steps(self) -> int:
        steps = len(self.train_loader)
        if steps == 0:
            raise VpeftError("train.drop_last: the training set is smaller than one batch")
        return steps

    # ---- one run ----

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch, evaluate the chosen checkpoint on the test split once, and return the metrics."""
        if self.run.resuming:
            self._load_state()
            self.run.logger.info("resuming %s after epoch %d", self.run.path, self.epoch)
        if self.run.main:
            self.run.keep_rows(self.epoch)
        self.scheduler.step_update(self.epoch * self.steps_per_epoch)
        if self.epoch < self.epochs:
            self._cache_features()
        while self.epoch < self.epochs:
            self._epoch()
        return self._finish()

    def _cache_features(self) -> None:
        """Store frozen features, where that is asked for and possible, and train and validate on them."""
        config = self.config.cache
        if config.mode == "off":
            return
        reason = why_no_cache(self.config)
        if self.accelerator.num_processes > 1:
            reason = "each process would need all features; run one process"
        try:
            if reason:
                raise CacheError(f"no features to cache: {reason}")
            for name, loader in (("train", self.train_loader), ("val", self.eval_loaders.get("val"))):
                if loader is not None:
                    cached = self._cached(loader, name)
                    self.train_loader = cached if name == "train" else self.train_loader
                    self.eval_loaders |= {"val": cached} if name == "val" else {}
        except CacheError as error:
            if config.mode != "auto":
                raise
            self.run.logger.info("cache.mode=auto: every epoch runs the whole model: %s", error)

    def _cached(self, loader, name: str) -> CachedLoader:
        config, started = self.config.cache, time.perf_counter()
        self.handle.eval()
        cache = FeatureCache(
            self.handle,
            dtype=config.dtype,
            mode=config.mode,
            budget=config.budget_gb * GB,
            folder=config.folder or Path(self.config.output) / "cache",
            autocast=self.accelerator.autocast,
        ).fill(loader, progress=self.run.main)
        self.run.logger.info(
            "features of %d %s samples (%.3f GB) in %s after %.1fs", len(cache.labels), name, cache.size / GB, cache.where,
            time.perf_counter() - started,
        )  # fmt: skip
        return cache.loader(loader)

    def _epoch(self) -> None:
        started = time.perf_counter()
        # Reseeding at every epoch makes a resumed run draw the same dropout as an uninterrupted one.
        set_seed(self.config.seed + 100_003 * self.epoch + 17 * self.accelerator.process_index)
        if self.recalibrate and self.epoch:
            self.recalibrate()
        train_loss = self._train_epoch()
        trained = time.perf_counter() - started
        row = {
            "epoch": self.epoch,
            "step": (self.epoch + 1) * self.steps_per_epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": train_loss,
            "train_seconds": round(trained, 3),
            "data_seconds": round(self.waited, 3),
        }
        values = self.evaluate("val")
        row |= {f"val_{k}": v for k, v in values.items()}
        value = values.get(self.task.monitor, float(self.epoch))
        is_best = self.config.train.select == "last" or not values or value > self.best["value"]
        if is_best:
            self.best = {"epoch": self.epoch, "value": value}
        self.epoch += 1
        if self.run.main:
            self.run.add_row(row | {"seconds": round(time.perf_counter() - started, 3)})
            self._save(is_best, values)
        self.accelerator.log({k: v for k, v in row.items() if k != "epoch"}, step=row["step"])
        keys = ("lr", "train_loss", "val_loss", f"val_{self.task.monitor}")
        shown = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if k in keys)
        share = 100 * self.waited / trained
        self.run.logger.info(
            "epoch %d/%d  %s  %.1fs (%.0f%% waiting for data)", self.epoch, self.epochs, shown, trained, share
        )

    def _train_epoch(self) -> float:
        """One pass over the training split; the mean loss per sample, over all processes."""
        accelerator = self.accelerator
        self._mode(True)
        batches = self.train_loader
        streamed = not hasattr(batches.batch_sampler, "global_size")
        if streamed:
            if hasattr(batches.dataset, "set_epoch"):
                batches.dataset.set_epoch(self.epoch)
        else:
            batches.batch_sampler.epoch = self.epoch
        total, count = torch.zeros((), dtype=torch.float64), 0
        with self._progress() as advance:
            for i, (images, labels) in enumerate(self._timed(batches)):
                # One process sees whole batches; a data set may have left out what it could not read.
                whole = streamed or accelerator.num_processes == 1
                size = len(labels) * accelerator.num_processes if whole else batches.batch_sampler.global_size(i)
                loss = self._step(images.to(accelerator.device), labels.to(accelerator.device), size)
                self.scheduler.step_update(self.epoch * self.steps_per_epoch + i + 1)
                total += loss.cpu().double()
                count += size
                advance()
        total = accelerator.reduce(total.float().to(accelerator.device), "sum")
        mean = float(total) / max(count, 1)
        if not math.isfinite(mean):
            raise VpeftError(
                f"the training loss is {mean} in epoch {self.epoch + 1}; lower optim.lr, or set train.clip_grad. "
                f"The last good state is in {self.run.path}"
            )
        return mean

    def _timed(self, batches: Iterable) -> Iterator:
        """The batches; ``waited`` becomes the seconds that the loop stood still for them in this epoch."""
        self.waited, batches = 0.0, iter(batches)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def _mode(self, training: bool) -> None:
        drops = self.config.model.drop_path or self.config.model.drop
        self.handle.train(training, backbone=bool(drops))
        if self.whole is not self.handle.model:
            self.whole.training = training  # its own flag only: the handle knows what stays frozen

    def _step(self, images: Tensor, labels: Tensor, global_size: int) -> Tensor:
        """One optimiser step; the sum of the local samples' losses.

        Each part's mean is weighted by its share of the global batch, so that accumulation and uneven last batches
        give the plain mean over the global batch's samples.
        """
        accelerator, world = self.accelerator, self.accelerator.num_processes
        parts = [(a, b) for a, b in zip(*(t.chunk(self.config.train.accumulate) for t in (images, labels)), strict=True)]
        summed = torch.zeros((), device=images.device)
        for i, (a, b) in enumerate(parts):
            last = i == len(parts) - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                with accelerator.autocast():
                    loss = self.task.loss(self.model, a, b, self.consistency) + self.handle.penalty()
                accelerator.backward(loss * (len(b) * world / global_size))
            summed += loss.detach().float() * len(b)
        self._watch()
        if self.config.train.clip_grad:
            accelerator.clip_grad_norm_(self.params, self.config.train.clip_grad)
        self.optimizer.step()
        self.handle.after_step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update()
        return summed

    def _watch(self) -> None:
        """Warn of trained tensors without a gradient: a dead site, or an initial value that can never learn."""
        self.steps += 1
        if self.without_gradient and self.steps <= 5:
            self.without_gradient = {n: p for n, p in self.without_gradient.items() if p.grad is None or not p.grad.any()}
            if self.without_gradient and self.steps == 5:
                names = list(self.without_gradient)
                self.run.logger.warning(
                    "no gradient in the first 5 steps reached %d trained tensors: %s", len(names), ", ".join(names[:4])
                )

    def evaluate(self, split: str) -> dict[str, float]:
        """Metrics of one split (empty where it does not exist), of the averaged weights where there are any."""
        loader = self.eval_loaders.get(split)
        if loader is None:
            return {}
        self._mode(False)
        if self.average:
            self.average.swap()
        try:
            # The inner module: DDP's forward would broadcast buffers, and uneven shards would then hang.
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=True)
            with torch.no_grad(), self.accelerator.autocast():
                return self.task.evaluate(model, loader, self.accelerator.device)
        finally:
            if self.average:
                self.average.swap()

    def _finish(self) -> dict[str, Any]:
        if self.average:
            self.average = None  # best.safetensors already holds the averaged values
        self.accelerator.wait_for_everyone()
        self._load_best()
        rows = self.run.rows()
        metrics = {
            "epoch": self.best["epoch"] + 1,
            "trainable": sum(p.numel() for p in self.params),
            "seconds_per_epoch": sorted(r["train_seconds"] for r in rows)[len(rows) // 2] if rows else None,
        }
        metrics |= {f"val_{k}": v for k, v in self.evaluate("val").items()}
        metrics |= {f"test_{k}": v for k, v in self.evaluate("test").items()}
        if self.run.main:
            for name in ("best", "last") if self.best["epoch"] + 1 == self.epochs else ("best",):
                self.handle.save(self.run.file(f"{name}.safetensors"), metrics=metrics, **self.metadata)
            self.run.finish(metrics, self.task.monitor, self.task.title)
            self.run.file("state.safetensors").unlink(missing_ok=True)
        self.accelerator.log({k: v for k, v in metrics.items() if v is not None})
        return metrics

    def _progress(self):
        return _Bar(self.run.main, self.steps_per_epoch, f"epoch {self.epoch + 1}/{self.epochs}")

    # ---- state ----

    def _save(self, is_best: bool, values: dict) -> None:
        """The epoch's checkpoints; the state file comes last, so that it never runs ahead of them."""
        metrics = {f"val_{k}": v for k, v in values.items()} | {"epoch": self.epoch}
        if self.average:
            self.average.swap()
        self.handle.save(self.run.file("last.safetensors"), metrics=metrics, training=True, **self.metadata)
        if is_best:
            self.handle.save(self.run.file("best.safetensors"), metrics=metrics, training=True, **self.metadata)
        if self.average:
            self.average.swap()
        tensors = {f"method/{n}": t for n, t in (self.handle.state_dict() | self.handle.head_state_dict()).items()}
        if self.average:
            tensors |= {f"average/{i}": v for i, v in enumerate(self.average.values)}
        scalars: dict[str, dict] = {}
        for index, entries in self.optimizer.state_dict()["state"].items():
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{index}/{key}"] = value
                else:
                    scalars.setdefault(str(index), {})[key] = value
        about = {"epoch": self.epoch, "best": self.best, "scalars": scalars}
        if self.accelerator.scaler is not None:
            about["scaler"] = self.accelerator.scaler.state_dict()
        path = self.run.file("state.safetensors")
        temporary = path.with_name(f".{path.name}.tmp")
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, temporary, {"state": json.dumps(about)})
        os.replace(temporary, path)

    @torch.no_grad()
    def _load_state(self) -> None:
        with safe_open(self.run.file("state.safetensors"), "pt") as f:
            about = json.loads(f.metadata()["state"])
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - safe_open is no mapping
        self.handle.load_state_dict(method_state(tensors))
        if self.average:
            for i, value in enumerate(self.average.values):
                value.copy_(tensors[f"average/{i}"])
        state: dict[int, dict] = {int(i): dict(v) for i, v in about["scalars"].items()}
        for name, value in tensors.items():
            if name.startswith("optimizer/"):
                _, index, key = name.split("/")
                state.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        if self.accelerator.scaler is not None and "scaler" in about:
            self.accelerator.scaler.load_state_dict(about["scaler"])
        self.epoch, self.best = about["epoch"], about["best"]

    @torch.no_grad()
    def _load_best(self) -> None:
        with safe_open(self.run.file("best.safetensors"), "pt") as f:
            self.handle.load_state_dict({k: f.get_tensor(k) for k in f.keys()})  # noqa: SIM118


def method_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The method's and the head's tensors in a state file."""
    return {n.removeprefix("method/"): t for n, t in tensors.items() if n.startswith("method/")}


class _Bar:
    """rich's progress bar as a context that yields ``advance()``; silent in all but the main process."""

    def __init__(self, show: bool, total: int, text: str):
        self.show, self.total, self.text = show, total, text

    def __enter__(self):
        if not self.show:
            return lambda: None
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, transient=True)
        task = self.bar.add_task(self.text, total=self.total)
        self.bar.start()
        return lambda: self.bar.advance(task)

    def __exit__(self, *error) -> None:
        if self.show:
            self.bar.stop()


def make_accelerator(config: DictConfig) -> Accelerator:
    """accelerate's Accelerator for this configuration: GPU where there is one, else CPU."""
    # accelerate keeps one precision per process; a second run in the same process may want another.
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision="no" if config.train.precision == "fp32" else config.train.precision,
        cpu=not torch.cuda.is_available(),
        log_with="wandb" if config.wandb.mode != "disabled" else None,
        project_dir=str(Path(config.output) / config.name),
    )
