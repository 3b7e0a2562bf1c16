"""The training loop: accelerate for devices and processes, timm for schedules, one state file for exact resume."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from omegaconf import DictConfig
from torch import Tensor

from ..data.splits import Datasets
from ..errors import VpeftError
from ..files import naming, read_tensors
from ..tasks.protocol import TaskModel
from ..tasks.step import training_loss
from ..tuning.handle import Handle
from .cache import GB, CachedLoader, CacheError, FeatureCache
from .config import why_no_cache
from .opening import skipped
from .progress import Bar, GradientWatch, TimedBatches
from .report import draw_curves
from .run import RunFolder
from .setup import make_loaders, make_optimizer, make_schedule
from .state import Average, RunState


class Trainer:
    """Trains what ``handle`` holds of a task's model on ``data``.

    Args:
        config: the experiment.
        built: the task's model.
        handle: of the method that is attached to its backbone.
        data: data sets.
        run: the run's folder.
        accelerator: made by ``make_accelerator``.
        metadata: for every checkpoint: ``class_names``, ``data`` and ``config`` of ``Handle.save``.
        recalibrate: called at the start of every epoch but the first.
    """

    def __init__(
        self,
        config: DictConfig,
        built: TaskModel,
        handle: Handle,
        data: Datasets,
        run: RunFolder,
        accelerator: Accelerator,
        metadata: dict[str, Any] | None = None,
        recalibrate: Callable[[], Any] | None = None,
    ):
        self.config, self.handle, self.task, self.run, self.accelerator = config, handle, built.task, run, accelerator
        self.metadata, self.recalibrate = metadata or {}, recalibrate
        self.loaders = make_loaders(config, data, accelerator)
        groups = handle.param_groups(config.optim.lr, config.optim.weight_decay, head_lr=config.optim.head_lr)
        self.params = [p for g in groups for p in g["params"]]
        optimizer = make_optimizer(config, groups)
        self.whole = built.model.to(accelerator.device)
        model = torch.compile(self.whole) if config.train.compile else self.whole
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.steps_per_epoch = len(self.loaders["train"])
        self.scheduler, self.epochs = make_schedule(config, self.optimizer, self.steps_per_epoch)
        self.average = Average(self.params, config.train.ema) if config.train.ema else None
        self.epoch, self.best = 0, {"epoch": None, "value": -math.inf}
        self.watch = GradientWatch(((n, p) for n, p in handle.named_parameters() if p.requires_grad), run.logger)

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
        reason = self.task.no_cache or why_no_cache(self.config)
        if self.accelerator.num_processes > 1:
            reason = "each process would need all features; run one process"
        try:
            if reason:
                raise CacheError(f"no features to cache: {reason}")
            for split in ("train", "val"):
                if split in self.loaders:
                    self.loaders[split] = self._cached(self.loaders[split], split)
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
        train_loss, waited = self._train_epoch()
        trained = time.perf_counter() - started
        row = {
            "epoch": self.epoch,
            "step": (self.epoch + 1) * self.steps_per_epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": train_loss,
            "train_seconds": round(trained, 3),
            "data_seconds": round(waited, 3),
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
        self._report(row, waited / trained)

    def _report(self, row: dict[str, Any], waiting: float) -> None:
        """An epoch's row for the trackers, and a line of it for people; ``waiting`` is a share of the time."""
        self.accelerator.log({k: v for k, v in row.items() if k != "epoch"}, step=row["step"])
        keys = ("lr", "train_loss", "val_loss", f"val_{self.task.monitor}")
        shown = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if k in keys)
        self.run.logger.info(
            "epoch %d/%d  %s  %.1fs (%.0f%% waiting for data)", self.epoch, self.epochs, shown, row["train_seconds"],
            100 * waiting,
        )  # fmt: skip

    def _train_epoch(self) -> tuple[float, float]:
        """One pass over the training split: the mean loss per sample, over all processes, and seconds waited for data."""
        accelerator, loader = self.accelerator, self.loaders["train"]
        self._mode(True)
        streamed = not hasattr(loader.batch_sampler, "global_size")
        if not streamed:
            loader.batch_sampler.epoch = self.epoch
        elif hasattr(loader.dataset, "set_epoch"):
            loader.dataset.set_epoch(self.epoch)
        total, count, batches = torch.zeros((), dtype=torch.float64), 0, TimedBatches(loader)
        with Bar(self.run.main, self.steps_per_epoch, f"epoch {self.epoch + 1}/{self.epochs}") as advance:
            for i, (inputs, targets) in enumerate(batches):
                # One process sees whole batches; a data set may have left out what it could not read.
                whole = streamed or accelerator.num_processes == 1
                size = len(targets) * accelerator.num_processes if whole else loader.batch_sampler.global_size(i)
                loss = self._step(inputs.to(accelerator.device), targets.to(accelerator.device), size)
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
        return mean, batches.waited

    def _mode(self, training: bool) -> None:
        drops = self.config.model.drop_path or self.config.model.drop
        self.handle.train(training, backbone=bool(drops))
        if self.whole is not self.handle.model:
            self.whole.training = training  # its own flag only: the handle knows what stays frozen

    def _step(self, inputs: Tensor, targets: Tensor, global_size: int) -> Tensor:
        """One optimiser step; the sum of the local samples' losses.

        Each part's mean is weighted by its share of the global batch, so that accumulation and uneven last batches
        give the plain mean over the global batch's samples.
        """
        accelerator, world = self.accelerator, self.accelerator.num_processes
        parts = [(a, b) for a, b in zip(*(t.chunk(self.config.train.accumulate) for t in (inputs, targets)), strict=True)]
        summed = torch.zeros((), device=inputs.device)
        for i, (a, b) in enumerate(parts):
            last = i == len(parts) - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                with accelerator.autocast():
                    loss = training_loss(self.task, self.model, a, b, self.handle)
                accelerator.backward(loss * (len(b) * world / global_size))
            summed += loss.detach().float() * len(b)
        self.watch.step()
        if self.config.train.clip_grad:
            accelerator.clip_grad_norm_(self.params, self.config.train.clip_grad)
        self.optimizer.step()
        self.handle.after_step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update()
        return summed

    def evaluate(self, split: str) -> dict[str, float]:
        """Metrics of one split (empty where it does not exist), of the averaged weights where there are any."""
        loader = self.loaders.get(split)
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
        metrics |= self._left_out()
        if self.run.main:
            for name in ("best", "last") if self.best["epoch"] + 1 == self.epochs else ("best",):
                self.handle.save(self.run.file(f"{name}.safetensors"), metrics=metrics, **self.metadata)
            draw_curves(self.run, self.task)
            self.run.finish(metrics)
            self.run.file("state.safetensors").unlink(missing_ok=True)
        self.accelerator.log({k: v for k, v in metrics.items() if v is not None})
        return metrics

    def _left_out(self) -> dict[str, int]:
        """How many samples of each split could not be read (``data.skip_broken``); the log names them."""
        found = skipped(self.loaders.items())
        for split, (count, reasons) in found.items():
            self.run.logger.info("%s: %d left out%s", split, count, "".join(f"\n  {reason}" for reason in reasons))
        return {f"{split}_skipped": count for split, (count, _) in found.items()}

    # ---- state ----

    def _save(self, is_best: bool, values: dict) -> None:
        """The epoch's checkpoints; the state file comes last, so that it never runs ahead of them."""
        metrics = {f"val_{k}": v for k, v in values.items()} | {"epoch": self.epoch}
        if self.average:
            self.average.swap()
        for name in ("last", "best") if is_best else ("last",):
            self.handle.save(self.run.file(f"{name}.safetensors"), metrics=metrics, training=True, **self.metadata)
        if self.average:
            self.average.swap()
        scaler = self.accelerator.scaler
        RunState(
            trained=self.handle.state_dict() | self.handle.head_state_dict(),
            average=self.average.values if self.average else [],
            optimizer=self.optimizer.state_dict()["state"],
            epoch=self.epoch,
            best=self.best,
            scaler=None if scaler is None else scaler.state_dict(),
        ).write(self.run.file("state.safetensors"))

    def _load_state(self) -> None:
        file = self.run.file("state.safetensors")
        state = RunState.read(file)
        with naming(file):
            self._take(state.trained)
        if self.average:
            self.average.load(state.average)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state.optimizer, "param_groups": groups})
        if self.accelerator.scaler is not None and state.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.epoch, self.best = state.epoch, state.best

    def _load_best(self) -> None:
        file = self.run.file("best.safetensors")
        _, tensors = read_tensors(file)
        with naming(file):
            self._take(tensors)

    def _take(self, tensors: dict[str, torch.Tensor]) -> None:
        """Values of this run, which has looked at its data, whatever they look like."""
        calibrated = self.handle.root.calibrated
        self.handle.load_state_dict(tensors)
        self.handle.root.calibrated = calibrated
