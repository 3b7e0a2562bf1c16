"""The hook that saves what was trained and continues an interrupted run."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.dist import all_gather_object, get_rank, get_world_size, is_main_process
from mmengine.hooks import Hook
from torch import Tensor

from ...engine.state import optimizer_state, optimizer_tensors
from ...errors import CheckpointError, VpeftError
from ...files import naming
from ...numerics import random_states_from_json, random_states_to_json
from ...options import check_values
from .averaging import SavedAverage
from .backbone import bare
from .best import BestValidation
from .registries import VPEFT_HOOKS
from .trained import (
    MODEL,
    SavedRun,
    check_classes,
    described_classes,
    fingerprints,
    judged,
    part,
    put_trained,
    read_trained,
    trained_tensors,
    write_trained,
)

STATE = "state.safetensors"


@VPEFT_HOOKS.register_module()
class SaveTrained(Hook):
    """In place of mmengine's CheckpointHook: writes what was trained, and continues an interrupted run exactly.

    ``WORK_DIR/iter_N.safetensors`` holds the trained tensors alone, with class names and palette, for mmsegmentation's
    ``init_model``, ``MMSegInferencer`` and ``load_from``, and for ``load_trained``; ``WORK_DIR/state.safetensors`` also
    holds the optimiser, the schedules and the random states, and is written after it. Both appear whole or not at all, and
    no pickle is read. Beside mmengine's ``EMAHook`` the files hold the averaged weights, which are those that validation
    judges; the state holds both, and the average goes on from there.

    The Runner's own ``resume=True`` (``--resume`` of mmsegmentation's ``tools/train.py``) continues from the work folder's
    state, or from the state that ``load_from`` names. Iteration-based loops pass the batches that were trained on already,
    and end with the weights of an uninterrupted run. ``load_from`` of an ``iter_N.safetensors`` without ``resume`` starts
    from, or tests, these weights; data with other classes, or the same in another order, are refused.

    Args:
        interval: iterations (in epoch-based loops epochs) between saves; the end is always saved.
        keep: how many ``iter_N`` files remain.
        resume: as the Runner's ``resume``, for where that cannot be set.
        save_best: a metric, as the evaluator names it (``mIoU``), or several: the weights of its best validation are kept as
            ``best_mIoU_iter_N.safetensors``. ``auto``: the evaluator's first.
        rule: whether ``greater`` or ``less`` is better; None: less, where ``loss`` is in the name.
        load_heads: False lets ``load_from`` in training take the backbone's tensors alone, for data with other classes.
        by_epoch: mmengine's, which must say what the loop does.
        max_keep_ckpts: mmengine's name of ``keep``; -1 keeps all.
        **others: refused.

    Raises:
        VpeftError: names the option.
    """

    priority = "VERY_LOW"

    def __init__(
        self,
        interval: int = 1000,
        keep: int = 2,
        resume: bool = False,
        save_best: str | Sequence[str] | None = None,
        rule: str | None = None,
        load_heads: bool = True,
        by_epoch: bool | None = None,
        max_keep_ckpts: int | None = None,
        **others: Any,
    ):
        if others:
            raise VpeftError(
                f"SaveTrained has no option {', '.join(sorted(others))}; where it comes from the configuration below this "
                "one, write _delete_=True into checkpoint=dict(…)"
            )
        if max_keep_ckpts is not None:
            keep = 10**9 if max_keep_ckpts == -1 else max_keep_ckpts
        if interval < 1 or keep < 1:
            raise VpeftError(f"SaveTrained: interval={interval} and keep={keep} must be at least 1")
        self.interval, self.keep, self.resume = interval, keep, resume
        self.load_heads, self.by_epoch = load_heads, by_epoch
        self.best = BestValidation(save_best, rule)
        self._from: Path | None = None
        self._saved = -1
        self._training = False
        self._frozen: dict[str, str] = {}

    # ---- when ----

    def before_run(self, runner) -> None:
        """Take over what the Runner would load, since its own way reads pickles."""
        self.average = SavedAverage(runner, self)
        if runner._has_loaded:  # a validation or test after a training, in one process
            return
        self.resume = self.resume or runner._resume
        given = Path(runner._load_from).expanduser() if runner._load_from else None
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
        self._check_loop(runner)
        self._training = True
        self._frozen = fingerprints(bare(runner.model))
        file, self._from = self._from, None
        if file is None:
            return
        if self.resume:
            self._restore(runner, file)
        else:
            self._load(runner, file, runner.train_dataloader, self.load_heads)

    def _check_loop(self, runner) -> None:
        counts, by_epoch = getattr(runner.optim_wrapper, "_accumulative_counts", 1), self._by_epoch(runner)
        if self.by_epoch not in (None, by_epoch):
            raise VpeftError(f"SaveTrained: by_epoch={self.by_epoch}, but the loop is a {type(runner.train_loop).__name__}")
        if self.interval % counts and not by_epoch:
            raise VpeftError(
                f"SaveTrained: interval={self.interval} would save between two steps of an optimiser that steps every "
                f"{counts} iterations; make it a multiple"
            )
        if self.best.keys:
            if runner.val_loop is None:
                raise VpeftError("SaveTrained: save_best needs a validation (val_dataloader, val_evaluator, val_cfg)")
            self.best.check(runner.val_evaluator)

    def before_val(self, runner) -> None:
        self._load_once(runner, runner.val_dataloader if self._from else None)

    def before_test(self, runner) -> None:
        self._load_once(runner, runner.test_dataloader if self._from else None)

    def _load_once(self, runner, loader: Any) -> None:
        file, self._from = self._from, None
        if file is not None:
            self._load(runner, file, loader)

    def _load(self, runner, file: Path, loader: Any, heads: bool = True) -> None:
        """Start from, or test, the weights of a file."""
        tensors, metadata = read_trained(file)
        if heads:
            check_classes(metadata, loader.dataset, file)
        values = judged(tensors)
        put_trained(runner.model, values, metadata, file, heads)
        self.average.put(values, metadata, file, heads)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        done = runner.iter + 1
        if not self._by_epoch(runner) and self._due(done, runner.max_iters):
            self._save(runner, done, runner.epoch)

    def after_train_epoch(self, runner) -> None:
        if self._by_epoch(runner) and self._due(runner.epoch + 1, runner.max_epochs):
            self._save(runner, runner.iter, runner.epoch + 1)

    def after_train(self, runner) -> None:
        self._training = False

    def after_val_epoch(self, runner, metrics: dict[str, Any] | None = None) -> None:
        if not self._training:
            return
        for name in self.best.better(metrics):
            count = f"epoch_{runner.epoch}" if self._by_epoch(runner) else f"iter_{runner.iter}"
            file = f"best_{name.replace('/', '_')}_{count}.safetensors"
            last = self.best.files.get(name, file)
            self.best.files[name] = file
            self._write(runner, file, runner.iter, runner.epoch)
            if is_main_process() and Path(last).name != file:
                (Path(runner.work_dir) / Path(last).name).unlink(missing_ok=True)

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
            self._write(runner, f"iter_{iteration}.safetensors", iteration, epoch)
            files = sorted(folder.glob("iter_*.safetensors"), key=lambda p: int(re.findall(r"\d+", p.stem)[0]))
            for old in [f for f in files if f.stem != f"iter_{iteration}"][: -self.keep + 1 or None]:
                old.unlink()
        self._save_state(runner, iteration, epoch)
        self._saved = iteration

    def _write(self, runner, name: str, iteration: int, epoch: int) -> None:
        """A file of what is judged: the average where there is one, else the model itself."""
        if is_main_process():
            judges = self.average.model or bare(runner.model)
            tensors = {f"{MODEL}{n}": t for n, t in trained_tensors(judges).items()}
            write_trained(Path(runner.work_dir) / name, tensors, self._about(runner, iteration, epoch))

    def _about(self, runner, iteration: int, epoch: int) -> dict[str, Any]:
        classes = described_classes(runner.train_dataloader.dataset)
        return {"iter": iteration, "epoch": epoch, "backbones": self._frozen, "dataset_meta": classes}

    def _save_state(self, runner, iteration: int, epoch: int) -> None:
        states = all_gather_object(random_states_to_json())
        if not is_main_process():
            return
        wrapper = runner.optim_wrapper.state_dict()
        moments, scalars = optimizer_tensors(wrapper["state"])
        tensors = {f"{MODEL}{n}": t for n, t in trained_tensors(bare(runner.model)).items()}
        tensors |= self.average.tensors() | moments
        base = wrapper.get("base_param_settings")
        metadata = {
            **self._about(runner, iteration, epoch), "scalars": scalars,
            "average": self.average.metadata(), "best": self.best.state(),
            "groups": wrapper["param_groups"], "scaler": wrapper.get("loss_scaler"), "random": states,
            "base": base and {k: v for k, v in base.items() if k != "params"},
            "schedulers": [s.state_dict() for s in runner.param_schedulers or []],
        }  # fmt: skip
        write_trained(Path(runner.work_dir) / STATE, tensors, metadata)

    def _restore(self, runner, file: Path) -> None:
        tensors, metadata = read_trained(file)
        if "random" not in metadata:
            raise CheckpointError(f"{file} holds weights alone; a run continues from {STATE}")
        with naming(file):
            check_values(SavedRun, metadata, CheckpointError)
        if len(metadata["random"]) != get_world_size():
            raise CheckpointError(f"{file}: written by {len(metadata['random'])} processes, here are {get_world_size()}")
        check_classes(metadata, runner.train_dataloader.dataset, file)
        self.average.check(metadata, file)
        put_trained(runner.model, part(tensors, MODEL), metadata, file)
        self.average.restore(tensors, metadata, file)
        with naming(file, KeyError, TypeError):
            self.best.restore(metadata.get("best", {}))
            self._restore_optimizer(runner, tensors, metadata)
        loop = runner.train_loop
        loop._iter, loop._epoch = metadata["iter"], metadata["epoch"]
        runner.optim_wrapper.initialize_count_status(runner.model, loop.iter, loop.max_iters)
        states = metadata["random"][get_rank()]
        if self._by_epoch(runner) or not metadata["iter"]:
            random_states_from_json(states)
        else:
            loop.dataloader_iterator = _Passing(loop.dataloader_iterator, metadata["iter"], states)
        runner.logger.info("continues after iteration %d, from %s", metadata["iter"], file)

    @staticmethod
    def _restore_optimizer(runner, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        # JSON has no tuples (betas).
        groups = [
            {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in g.items()} for g in metadata["groups"]
        ]
        wrapper = {"state": optimizer_state(tensors, metadata["scalars"]), "param_groups": groups}
        if metadata["scaler"] is not None:
            wrapper["loss_scaler"] = metadata["scaler"]
        schedulers = runner.param_schedulers or []
        try:
            runner.optim_wrapper.load_state_dict(wrapper)
            for scheduler, values in zip(schedulers, metadata["schedulers"], strict=True):
                scheduler.load_state_dict(values)
        except ValueError as error:
            raise CheckpointError(f"the optimiser or the schedule is not the one that was saved: {error}") from error
        base = runner.optim_wrapper.base_param_settings
        if base is not None:
            base.update(metadata["base"] or {})


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
                random_states_from_json(self.states)
        return batch
