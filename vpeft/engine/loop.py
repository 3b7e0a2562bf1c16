"""The training loop: accelerate for devices and processes, timm for schedules, one state file for exact resume."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from omegaconf import DictConfig
from torch import Tensor

from .. import checkpoint
from ..data.splits import Datasets
from ..errors import CheckpointError
from ..files import naming
from ..metadata import FORMAT
from ..reporting.record import Record
from ..tasks.protocol import TaskModel
from ..tasks.step import training_loss
from ..tuning.handle import Handle
from .best import keep_training_form, read_best
from .cache import CacheError
from .config import why_no_cache
from .layer_rates import by_layer, rate_lines
from .opening import count_skipped
from .plan import STATE
from .progress import Bar, GradientWatch, Pace, TimedBatches, epoch_line, peak_memory
from .report import draw_curves
from .results import gathered, make_record, sparing, write_results
from .run import RunFolder
from .setup import make_loaders, make_optimizer, make_schedule
from .state import Average, RunState
from .stored import stored
from .trouble import not_finite


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
        self.data, self.metadata, self.recalibrate = data, metadata or {}, recalibrate
        self.loaders = make_loaders(config, data, accelerator)
        groups = handle.param_groups(config.optim.lr, config.optim.weight_decay, head_lr=config.optim.head_lr)
        groups = by_layer(config, handle, groups)
        for line in rate_lines(handle, groups):
            run.logger.info("%s", line)
        self.params = [p for g in groups for p in g["params"]]
        optimizer = make_optimizer(config, groups)
        self.whole = built.model.to(accelerator.device)
        model = torch.compile(self.whole) if config.train.compile else self.whole
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.steps_per_epoch = len(self.loaders["train"])
        self.scheduler, self.epochs = make_schedule(config, self.optimizer, self.steps_per_epoch)
        self.average = Average(self.params, config.train.ema) if config.train.ema else None
        self.epoch, self.best, self.lost = 0, {"epoch": None, "value": -math.inf}, -math.inf
        self.changes: list[dict[str, Any]] = []
        self.notes: dict[str, Any] = {}
        self.record: Record | None = None  # of the test split
        self.pace = Pace()
        self.after_epoch: Callable[[dict[str, Any]], Any] = lambda row: None  # given the epoch's row; may raise to end it
        self.watch = GradientWatch(((n, p) for n, p in handle.named_parameters() if p.requires_grad), run.logger)

    # ---- one run ----

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch, evaluate the chosen checkpoint on the test split once, and return the metrics."""
        if self.run.resuming:
            self._load_state()
            self.run.logger.info("resuming %s after epoch %d", self.run.path, self.epoch)
        self.run.begin(self.epoch)
        if self.run.resuming and self.run.main:
            self._check_best()
        self.scheduler.step_update(self.epoch * self.steps_per_epoch)
        if not self._done():
            self._cache_features()
        while not self._done():
            self._epoch()
        return self._finish()

    def _done(self) -> bool:
        return self.epoch >= self.epochs or self._out_of_patience()

    def _out_of_patience(self) -> bool:
        patience, best = self.config.train.patience, self.best["epoch"]
        return patience is not None and best is not None and self.epoch - 1 - best >= patience

    def _cache_features(self) -> None:
        """Store frozen features, where that is asked for and possible, and train and validate on them."""
        config = self.config.cache
        if config.mode == "off":
            return
        reason = self.task.no_cache or why_no_cache(self.config)
        accelerator = self.accelerator
        if accelerator.num_processes > 1:
            reason = "each process would need all features; run one process"
        try:
            if reason:
                raise CacheError(f"no features to cache: {reason}")
            for split in ("train", "val"):
                if split in self.loaders:
                    loader = self.loaders[split]
                    cache = stored(self.config, self.handle, loader, split, accelerator, self.run)
                    self.loaders[split] = cache.loader(loader)
        except CacheError as error:
            if config.mode != "auto":
                raise
            self.run.logger.info("cache.mode=auto: every epoch runs the whole model: %s", error)

    def _epoch(self) -> None:
        started = time.perf_counter()
        # Reseeding at every epoch makes a resumed run draw the same dropout as an uninterrupted one.
        set_seed(self.config.seed + 100_003 * self.epoch + 17 * self.accelerator.process_index)
        if self.recalibrate and self.epoch:
            self.recalibrate()
        train_loss, waited, samples = self._train_epoch()
        trained = max(round(time.perf_counter() - started, 3), 0.001)
        row = {
            "epoch": self.epoch,
            "step": (self.epoch + 1) * self.steps_per_epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": train_loss,
            "train_seconds": trained,
            "data_seconds": round(waited, 3),
            "samples_per_second": round(samples / trained, 2),
            **peak_memory(self.accelerator.device),
        }
        values = self.evaluate("val")
        row |= {f"val_{k}": v for k, v in values.items()}
        value = values.get(self.task.monitor, float(self.epoch))
        is_best = self.config.train.select == "last" or not values or value > self.best["value"]
        if is_best:
            self.best = {"epoch": self.epoch, "value": value}
            if value > self.lost:
                self.notes.pop("lost_best", None)
        self.epoch += 1
        if self.run.main:
            self.run.add_row(row | {"seconds": round(time.perf_counter() - started, 3)})
            self._save(is_best, values)
        self.run.kept = self.epoch
        self.pace.add(time.perf_counter() - started)
        self._report(row, waited / trained)
        self.after_epoch(row)

    def _report(self, row: dict[str, Any], waiting: float) -> None:
        """An epoch's row for the trackers, and a line of it for people; ``waiting`` is a share of the time."""
        self.accelerator.log({k: v for k, v in row.items() if k != "epoch"}, step=row["step"])
        left = "" if self._done() else f"  {self._left(self.epochs - self.epoch)}"
        self.run.logger.info("epoch %d/%d  %s%s", self.epoch, self.epochs, epoch_line(row, self.task.monitor, waiting), left)

    def _left(self, epochs: int) -> str:
        return self.pace.left(epochs, at_most=self.config.train.patience is not None)

    def _train_epoch(self) -> tuple[float, float, int]:
        """One pass over the training split: the mean loss per sample, seconds waited for data, samples of all processes."""
        accelerator, loader = self.accelerator, self.loaders["train"]
        self._mode(True)
        streamed = not hasattr(loader.batch_sampler, "global_size")
        if not streamed:
            loader.batch_sampler.epoch = self.epoch
        elif hasattr(loader.dataset, "set_epoch"):
            loader.dataset.set_epoch(self.epoch)
        total, count, batches = torch.zeros((), dtype=torch.float64), 0, TimedBatches(loader)
        text = f"epoch {self.epoch + 1}/{self.epochs}  {self._left(self.epochs - self.epoch)}"
        with Bar(self.run.main, self.steps_per_epoch, text.rstrip()) as advance:
            for i, (inputs, targets) in enumerate(batches):
                # One process sees whole batches; a data set may have left out what it could not read.
                whole = streamed or accelerator.num_processes == 1
                size = len(targets) * accelerator.num_processes if whole else loader.batch_sampler.global_size(i)
                inputs = inputs.to(accelerator.device)
                loss = self._step(i, inputs, targets.to(accelerator.device), size)
                self.scheduler.step_update(self.epoch * self.steps_per_epoch + i + 1)
                total += loss.cpu().double()
                count += size
                advance()
        total = accelerator.reduce(total.float().to(accelerator.device), "sum")
        return float(total) / max(count, 1), batches.waited, count

    def _mode(self, training: bool) -> None:
        drops = self.config.model.drop_path or self.config.model.drop
        self.handle.train(training, backbone=bool(drops))
        if self.whole is not self.handle.model:
            self.whole.training = training  # its own flag only: the handle knows what stays frozen

    def _step(self, number: int, inputs: Tensor, targets: Tensor, global_size: int) -> Tensor:
        """One optimiser step; the sum of the local samples' losses.

        Raises:
            VpeftError: it is no number; before anything is changed by it.

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
        if not torch.isfinite(summed):
            loader, mean = self.loaders["train"], float(summed) / len(inputs)
            raise not_finite(self.run, loader, mean, self.epoch, number, inputs)
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
        loader, record = self.loaders.get(split), self.record if split == "test" else None
        if loader is None:
            return {}
        self._mode(False)
        if self.average:
            self.average.swap()
        try:
            # The inner module: DDP's forward would broadcast buffers, and uneven shards would then hang.
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=True)
            with torch.no_grad(), self.accelerator.autocast():
                if record is None:
                    return self.task.evaluate(model, loader, self.accelerator.device)
                return self.task.evaluate(model, record, self.accelerator.device, record=record)
        finally:
            if self.average:
                self.average.swap()

    def _finish(self) -> dict[str, Any]:
        self.accelerator.wait_for_everyone()
        self._load_best()
        rows = self.run.rows()
        metrics = {
            "epoch": self.best["epoch"] + 1,
            "trainable": sum(p.numel() for p in self.params),
            "seconds_per_epoch": sorted(r["train_seconds"] for r in rows)[len(rows) // 2] if rows else None,
        }
        metrics |= {f"val_{k}": v for k, v in self.evaluate("val").items()}
        self.record = make_record(
            self.config, self.task, self.loaders.get("test"), self.data.classes, self.metadata.get("data"), self.accelerator
        )
        metrics |= {f"test_{k}": v for k, v in (self.evaluate("test") | gathered(self.record)).items()}
        for name in self.data.also:
            metrics |= {f"test_{name}_{k}": v for k, v in self.evaluate(name).items()}
        metrics |= count_skipped(self.loaders, self.run.logger)
        if self.epoch < self.epochs:
            self.notes["stopped_early"] = self.epoch
            self.run.logger.info("stopped early after epoch %d: no better one than epoch %d in train.patience=%d epochs",
                                 self.epoch, metrics["epoch"], self.config.train.patience)  # fmt: skip
        if self.changes:
            self.notes["changed_settings"] = self.changes
        if self.run.main:
            self._keep(metrics)
            # What people look at may fail; the run is done, and its test is not to be read again.
            with sparing("curves.png", self.run.logger.warning):
                draw_curves(self.run, self.task)
            with sparing("predictions.csv and what is made of it", self.run.logger.warning):
                write_results(self.run.folder, self.record)
            self.run.finish(metrics | self.notes | self.data.notes)
        self.accelerator.log(
            {k: v for k, v in metrics.items() if v is not None and k != "epoch"}, step=self.epoch * self.steps_per_epoch
        )
        return metrics | self.notes | self.data.notes

    def _keep(self, metrics: dict[str, Any]) -> None:
        """The checkpoints of the finished run."""
        keep_training_form(self.run, self.handle, metrics=metrics, **self.metadata)
        for name in ("best", "last") if self.best["epoch"] + 1 == self.epoch else ("best",):
            self.handle.save(self.run.file(f"{name}.safetensors"), metrics=metrics, **self.metadata)

    # ---- state ----

    def _save(self, is_best: bool, values: dict) -> None:
        """The epoch's checkpoints; the state file comes last, so that it never runs ahead of them."""
        metrics = {f"val_{k}": v for k, v in values.items()} | {"epoch": self.epoch}
        self.run.begin_keeping()
        self._write(("last", "best") if is_best else ("last",), metrics)
        scaler = self.accelerator.scaler
        method = self.handle.method
        self.run.keep(
            RunState(
                trained=self.handle.state_dict() | self.handle.head_state_dict(),
                average=self.average.values if self.average else [],
                optimizer=self.optimizer.state_dict()["state"],
                epoch=self.epoch,
                best=self.best,
                scaler=None if scaler is None else scaler.state_dict(),
                method={"format": FORMAT, "method": {"name": method.name, "options": method.options()}},
                changes=self.changes,
            )
        )

    def _write(self, names: Sequence[str], metrics: dict[str, Any]) -> None:
        """Checkpoints of the present values, averaged where they are."""
        if self.average:
            self.average.swap()
        for name in names:
            self.handle.save(self.run.file(f"{name}.safetensors"), metrics=metrics, training=True, **self.metadata)
        if self.average:
            self.average.swap()

    def _load_state(self) -> None:
        file = self.run.file(STATE)
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
        changed = {k: list(pair) for k, pair in self.run.plan.changes.items()}
        self.changes = [*state.changes, *([{"after_epoch": self.epoch, **changed}] if changed else [])]

    def _check_best(self) -> None:
        """Write the checkpoints of a run that goes on again, where they are damaged or gone: the state has the last one."""
        broken = [e for e in map(self._damage, ("last", "best")) if e]
        if not broken:
            return
        row = (self.run.rows() or [{}])[-1]
        metrics = {k: v for k, v in row.items() if k.startswith("val_")} | {"epoch": self.epoch}
        self._write(("last",), metrics)
        lost = self._damage("best")
        if lost:
            if self.best["epoch"] != self.epoch - 1:
                self.notes["lost_best"], self.lost = self.best["epoch"] + 1, self.best["value"]
                lost += f"; the weights of epoch {self.notes['lost_best']} are lost, the best is chosen from {self.epoch} on"
                value = row.get(f"val_{self.task.monitor}", float(self.epoch - 1))
                self.best = {"epoch": self.epoch - 1, "value": value}
            self._write(("best",), metrics)
        self.run.logger.warning("%s; written again from the state after epoch %d", lost or broken[0], self.epoch)

    def _damage(self, name: str) -> str:
        """What is wrong with a checkpoint of this run, or nothing."""
        try:
            file = checkpoint.read(self.run.file(f"{name}.safetensors"))
        except CheckpointError as error:
            return str(error)
        epoch, best = (file.metadata["metrics"] or {}).get("epoch"), self.best["epoch"] + 1
        if name == "best" and epoch not in (None, best):  # killed before the state; the epoch may come out otherwise now
            return f"{file.path} is of epoch {epoch}, not of epoch {best}"
        return ""

    def _load_best(self) -> None:
        """The chosen epoch's values; the last one's, which are at hand, where its file is damaged."""
        average, self.average = self.average, None  # best.safetensors holds the averaged values
        try:
            file = read_best(self.run, self.best["epoch"] + 1)
        except CheckpointError as error:
            if average:
                average.swap()
            self.run.logger.warning("%s; the last epoch, %d, is kept in its place", error, self.epoch)
            self.notes["lost_best"] = self.best["epoch"] + 1
            self.best = {"epoch": self.epoch - 1, "value": None}
            return
        with naming(file.path):
            self._take(file.tensors)

    def _take(self, tensors: dict[str, torch.Tensor]) -> None:
        """Values of this run, which has looked at its data, whatever they look like."""
        calibrated = self.handle.root.calibrated
        self.handle.load_state_dict(tensors)
        self.handle.root.calibrated = calibrated
