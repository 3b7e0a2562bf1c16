"""The rows of a measurement: one model each, all on the same frozen weights, with a training step and a forward."""

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ..backbone.modules import FIRST
from ..backbone.reading import input_size
from ..backbone.sites import Sites
from ..data.loader import make_loader
from ..engine.cache import CachedLoader, FeatureCache, why_not
from ..engine.config import load_config
from ..engine.opening import open_data
from ..errors import ConfigError, MethodError, VpeftError
from ..methods import Method, create, list_methods, on_images
from ..tasks.labels import LabelStep
from ..tasks.models import create_timm
from ..tasks.protocol import TaskModel
from ..tasks.registry import get_task
from ..tasks.step import training_loss
from ..tuning.attaching import attach
from ..tuning.handle import Handle
from .config import PEFT

# The rows that every table has, to which the others are put in proportion.
FULL, FROZEN, LIMIT = "full", "frozen", "limit"


class Batch:
    """One batch and the precision that it is computed in."""

    def __init__(self, config: DictConfig, images: Tensor, labels: Tensor):
        self.device = torch.device(config.device)
        self.images, self.labels = images.to(self.device), labels.to(self.device)
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)

        self.clock = time.process_time if config.clock == "cpu" else time.perf_counter

    def precision(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def finish(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, run: Callable[[], object]) -> float:
        """Seconds that a call takes."""
        self.finish()
        start = self.clock()
        run()
        self.finish()
        return self.clock() - start


class Row:
    """A model with something to train in it.

    Args:
        label: what the table calls it.
        subject: the row's own model and its task; frozen weights may be every row's.
        batch: what it runs on.
        trained: parameters of the optimiser, or its groups.
        update: whether a step includes AdamW's (at a rate of 0, so that no weight moves).
    """

    handle: Handle | None = None
    forwards = True  # whether forwards are measured too

    def __init__(self, label: str, subject: TaskModel, batch: Batch, trained: list, update: bool):
        self.label, self.subject, self.model, self.batch = label, subject, subject.model, batch
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True) if update and trained else None
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    @property
    def parameters(self) -> int:
        """Trained numbers, the heads' left out."""
        return 0

    @property
    def weight(self) -> int:
        """Numbers that the optimiser sees."""
        return sum(p.numel() for p in self.trained)

    def forget_state(self) -> None:
        """Drop what the optimiser keeps; its next step makes it anew."""
        if self.optimizer is not None:
            self.optimizer.state.clear()

    @property
    def trains(self) -> bool:
        """Whether a training step has a meaning."""
        return True

    def training(self) -> None:
        """Into the mode that a step is made in."""
        self.model.eval()  # a frozen backbone stays in it

    def inference(self) -> None:
        """Into the mode that a forward is made in."""
        self.model.eval()

    def loss(self) -> Tensor:
        with self.batch.precision():
            return training_loss(self.subject.task, self.model, self.batch.images, self.batch.labels, self.handle)

    def step(self) -> None:
        self.update(self.loss())

    def cached(self) -> Callable[[], None] | None:
        """A step from stored features; None where a row has none."""
        return None

    def update(self, loss: Tensor) -> None:
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.after_step()
        for parameter in self.trained:
            parameter.grad = None

    def after_step(self) -> None:
        """What a method does after each update."""

    @torch.no_grad()
    def forward(self) -> Tensor:
        with self.batch.precision():
            return self.model(self.batch.images)


class FrozenRow(Row):
    """The bare forward; nothing is trained."""

    @property
    def trains(self) -> bool:
        return False


class LimitRow(Row):
    """The frozen backbone with a gradient carried to the first block's input, and nothing else: what no method that
    acts in the first block can undercut.

    Args:
        boundary: carry it to this module instead: its input, or the output of what takes the image.
    """

    def __init__(self, label: str, subject: TaskModel, batch: Batch, boundary: str | None = None):
        subject.model.requires_grad_(False)
        super().__init__(label, subject, batch, [], False)
        sites = Sites(subject.backbone)
        self.boundary = boundary or sites.blocks[0].path
        module = subject.backbone.get_submodule(self.boundary)
        if self.boundary == sites.boundary(FIRST):
            module.register_forward_hook(lambda module, args, output: _first_carried(output))
        else:
            module.register_forward_pre_hook(lambda module, args: _first_carried(args))
        self.everywhere = boundary is None

    def update(self, loss: Tensor) -> None:
        # Where a task's own heads alone are trained, the model's classifier, their boundary, may not be called at all.
        if self.everywhere or loss.requires_grad:
            super().update(loss)


def _first_carried(x: Tensor | tuple) -> Tensor | tuple:
    return _carried(x) if isinstance(x, Tensor) else (_carried(x[0]), *x[1:])


def _carried(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(torch.is_grad_enabled())


class MethodRow(Row):
    """One of our methods."""

    def __init__(self, label: str, subject: TaskModel, batch: Batch, method: Method, update: bool):
        self.handle = attach(subject.backbone, method, name="bench", heads=subject.heads)
        self.handle.calibrate([(batch.images, batch.labels)], progress=False, **subject.calibration())
        super().__init__(label, subject, batch, self.handle.param_groups(lr=0.0), update)
        self._stored: CachedLoader | None = None

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.handle.parameters())

    def training(self) -> None:
        self.handle.train()

    def inference(self) -> None:
        self.handle.eval()

    def after_step(self) -> None:
        self.handle.after_step()

    def cached(self) -> Callable[[], None] | None:
        """A step from stored features of the batch, or None where nothing frozen lies below what is trained."""
        whole = self.subject.model is self.subject.backbone and not isinstance(self.batch.dtype, torch.dtype)
        if not whole or self.batch.images.ndim != 4 or why_not(self.handle) is not None:
            return None
        if self._stored is None:
            batch = TensorDataset(self.batch.images.cpu(), self.batch.labels.cpu())
            loader = make_loader(batch, len(batch), train=False)
            self._stored = FeatureCache(self.handle, mode="memory").fill(loader, progress=False).loader(loader)

        def run() -> None:
            for images, labels in self._stored:
                loss = training_loss(self.subject.task, self.model, images, labels.to(self.batch.device))
                self.update(loss + self.handle.penalty())

        return run


class PeftRow(Row):
    """LoRA of huggingface's peft on the same model."""

    def __init__(
        self, label: str, subject: TaskModel, batch: Batch, update: bool, rank: int, targets: list[str], alpha: float
    ):
        from peft import LoraConfig, get_peft_model

        model = subject.backbone
        if subject.model is not model:
            raise ConfigError(f"rows: '{PEFT}' is measured on timm models alone, without a task's own model around them")
        head = [n for n, m in model.named_modules() if m is model.get_classifier()]
        made = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, modules_to_save=head))
        trained = [p for p in made.parameters() if p.requires_grad]
        super().__init__(label, TaskModel(made, made, subject.task), batch, trained, update)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for n, p in self.model.named_parameters() if p.requires_grad and "lora_" in n)


def peft_installed() -> bool:
    """Whether huggingface's peft can be imported."""
    try:
        import peft  # noqa: F401
    except ImportError:
        return False
    return True


def twin(subject: TaskModel) -> TaskModel:
    """A copy whose parameters are its own objects, with flags and gradients of their own, on the same memory."""
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in subject.model.parameters()}
    return copy.deepcopy(subject, memo)


@dataclass
class Planned:
    """A row that is to be.

    Attributes:
        label: what the table calls it.
        build: makes it, on a model of its own.
        swept: one of all methods, which the model may refuse.
    """

    label: str
    build: Callable[[TaskModel, Batch], Row]
    swept: bool = False


def references(config: DictConfig) -> list[Planned]:
    """Full fine-tuning, the frozen forward and the limit."""
    return [
        Planned(FULL, lambda subject, batch: MethodRow(FULL, subject, batch, create("full"), config.update)),
        Planned(FROZEN, lambda subject, batch: FrozenRow(FROZEN, _frozen(subject), batch, [], False)),
        Planned(LIMIT, lambda subject, batch: LimitRow(LIMIT, subject, batch)),
    ]


def planned(config: DictConfig) -> list[Planned]:
    """What the configuration asks for beside the references.

    Raises:
        ConfigError: a row that cannot be.
    """
    found = [_plan(row, config.update) for row in config.rows]
    labels = [FULL, FROZEN, LIMIT, *(p.label for p in found)]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"rows: two are called '{label}'; give one of them another label")
    if config.all_methods:
        found += [_swept(name, config.update) for name in list_methods() if name not in labels]
    return found


def _swept(name: str, update: bool) -> Planned:
    def build(subject: TaskModel, batch: Batch) -> Row:
        options = on_images(name) if batch.images.ndim == 4 else {}
        return MethodRow(name, subject, batch, create(name, **options), update)

    return Planned(name, build, swept=True)


def opened(config: DictConfig) -> tuple[TaskModel, Batch]:
    """The model that every row has a twin of, and the batch."""
    base, batch = _experiment(config) if config.experiment else classifier(config)
    base.model.to(config.device).eval()
    return base, batch


def built(plans: list[Planned], base: TaskModel, batch: Batch, config: DictConfig) -> list[Row]:
    """The rows, each on a twin of the model, which torch compiles where that was asked for.

    Raises:
        UnsupportedModelError: a method that this backbone does not take.
    """
    rows = [p.build(twin(base), batch) for p in plans]
    if config.compile:  # the rows share timm's code, of which each needs editions for training, inference and merged
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64 * len(rows))
        for row in rows:
            row.model.compile(mode=None if config.compile_mode == "default" else config.compile_mode)
    return rows


def make_rows(config: DictConfig) -> tuple[list[Row], Batch]:
    """All rows of a table at once, the references first, and the batch. Raises as ``planned`` and ``built`` do."""
    plans = [*references(config), *planned(config)]
    base, batch = opened(config)
    return built(plans, base, batch, config), batch


def _frozen(subject: TaskModel) -> TaskModel:
    subject.model.requires_grad_(False)
    return subject


def classifier(config: DictConfig) -> tuple[TaskModel, Batch]:
    """The timm model of a table, and a random batch."""
    torch.manual_seed(config.seed)
    m = config.model
    kwargs = {**OmegaConf.to_container(m.kwargs), **({"img_size": m.img_size} if m.img_size else {})}
    if m.checkpoint:
        kwargs["pretrained_cfg_overlay"] = {"file": m.checkpoint}
    base = create_timm(config, pretrained=m.pretrained, num_classes=config.num_classes, **kwargs)
    generator = torch.Generator().manual_seed(config.seed)
    images = torch.randn(config.batch_size, *input_size(base), generator=generator)
    labels = torch.randint(config.num_classes, (config.batch_size,), generator=generator)
    return TaskModel(base, base, LabelStep(config.num_classes)), Batch(config, images, labels)


def _experiment(config: DictConfig) -> tuple[TaskModel, Batch]:
    """The model of an experiment's task, and its first training samples."""
    experiment = load_config(config.experiment)
    task = get_task(experiment)
    task.check()
    data, _ = open_data(experiment, task)
    torch.manual_seed(config.seed)
    backbone = task.build_backbone(len(data.classes))
    loader = make_loader(data.train, config.batch_size, train=False)
    return task.assemble(backbone, len(data.classes)), Batch(config, *next(iter(loader)))


def _plan(row: DictConfig, update: bool) -> Planned:
    options, label = OmegaConf.to_container(row.options), row.label or row.name
    if row.name == PEFT:
        if not peft_installed():
            raise ConfigError(f"rows: '{PEFT}' needs huggingface's peft; install it with: pip install vpeft[bench]")
        unknown = options.keys() - {"rank", "targets", "alpha"}
        if unknown:
            raise ConfigError(f"rows: {PEFT} has no option '{min(unknown)}'; it has rank, targets and alpha")
        options = {"rank": 8, "targets": ["qkv"], "alpha": 8.0} | options
        return Planned(label, lambda subject, batch: PeftRow(label, subject, batch, update, **options))
    try:
        method = create(row.name, **options)
    except VpeftError as error:
        raise ConfigError(f"rows: {error}") from error
    return Planned(label, lambda subject, batch: MethodRow(label, subject, batch, method, update))


def merged_forward(row: Row) -> Callable[[], Tensor] | None:
    """Folds the row's method in and gives its forward, or None where it does not fold; ``row.handle.unmerge`` after it."""
    if row.handle is None or not row.handle.mergeable:
        return None
    try:
        row.handle.merge()
    except MethodError:
        return None
    return row.forward
