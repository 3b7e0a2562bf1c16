"""``vpeft bench --plan``: what memory a training step takes, told before training.

Bytes that autograd keeps are measured on small batches and are linear in the batch; everything else follows from shapes.
"""

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from timm.optim import create_optimizer_v2

from ..backbone.hollow import Hollow
from ..engine.config import check_options
from ..engine.layers import setting
from ..errors import ConfigError
from ..methods import Method, create, on_images
from ..tasks.models import check_model_name
from .config import BenchConfig, check_device
from .memory import peak_bytes, saved_bytes
from .rows import Batch, MethodRow, classifier

SMALL, CHECK = (3, 5), 6  # images measured (with 2, AIM keeps more for each), and of one that says how far the line is off
Context = Callable[[bool], AbstractContextManager]


@dataclass
class MemoryPlan:
    """Bytes of a training step.

    Attributes:
        model, method: what was measured; the method with the options that it has.
        weights: parameters and buffers, the method's and the head's included.
        trained: numbers that the optimiser sees, and of these the head's.
        gradients, optimizer: of what is trained.
        image: one of a batch, as the model takes it.
        saved: (constant, for each image) that autograd keeps for backward.
        peak: (constant, for each image) of a GPU's highest memory in a step; None elsewhere.
        off: how far ``saved`` was from what a batch of ``CHECK`` images really keeps, as a share of it.
    """

    model: str
    method: Method
    weights: int
    trained: int
    head: int
    gradients: int
    optimizer: int
    image: int
    saved: tuple[float, float]
    peak: tuple[float, float] | None
    off: float

    def saved_at(self, batch: int) -> int:
        """Bytes kept for backward with a batch of so many images."""
        return round(self.saved[0] + batch * self.saved[1])

    def total_at(self, batch: int) -> int:
        """All of it at the end of the forward, or a GPU's peak where that was measured."""
        if self.peak is not None:
            return round(self.peak[0] + batch * (self.peak[1] + self.image)) + self.optimizer
        return self.weights + self.gradients + self.optimizer + batch * self.image + self.saved_at(batch)


def settings(items: Sequence[str]) -> dict[str, Any]:
    """A method's options from ``key=value``, as YAML has them.

    Raises:
        ConfigError: one that is not readable; names it.
    """
    return {key: value for item in items for key, value in OmegaConf.to_container(setting(item, "option")).items()}


def plan(
    model: str,
    method: str,
    options: dict[str, Any],
    *,
    precision: str = "fp32",
    optim: str = "adamw",
    device: str = "cpu",
    num_classes: int = 100,
    img_size: int | None = None,
) -> MemoryPlan:
    """Measure one method on one model, whose weights are not needed.

    Args:
        model: a timm model.
        method: a registered method.
        options: its hyper-parameters.
        precision: ``fp32``, or that of autocast.
        optim: an optimiser of timm.
        device: whose kernels are asked; on a GPU the peak is measured too.
        num_classes: of the head.
        img_size: of the model, its own where None.

    Raises:
        ConfigError: an unknown model, precision, device or optimiser.
        MethodError: an unknown method or hyper-parameter.
        UnsupportedModelError: a model that the method does not take.
    """
    create(method, **options)  # whatever is wrong with what was given
    made = create(method, **(on_images(method) | options))
    given = {"device": device, "precision": precision, "num_classes": num_classes, "update": False}
    config = OmegaConf.merge(
        OmegaConf.structured(BenchConfig), {**given, "model": {"name": model, "img_size": img_size}, "all_methods": True}
    )
    check_options(config)
    check_model_name(config)
    check_device(config)
    optimizer_bytes(optim, [torch.nn.Parameter(torch.zeros(1))])  # refused before anything is measured
    if torch.device(device).type == "cpu" and not made.needs_calibration:  # which looks at values
        try:
            return _measured(config, made, optim, Hollow)
        except Exception:  # zeros may be what a method cannot work with; what cannot be at all fails again
            return _measured(config, made, optim, lambda making: nullcontext())
    return _measured(config, made, optim, lambda making: nullcontext())


def _measured(config: DictConfig, method: Method, optim: str, context: Context) -> MemoryPlan:
    with context(True):
        base, batch = classifier(config)
    base.model.to(config.device).eval()
    with context(False):
        row = MethodRow("plan", base, batch, method, False)
        tensors = {id(t): t for t in [*row.model.parameters(), *row.model.buffers()]}
        saved, peaks = [], []
        for number in (*SMALL, CHECK):
            row.batch = _batch(config, batch, number)
            saved.append(saved_bytes(row))
            peaks.append(peak_bytes(row))
    line = _line(*saved[:2])
    found = line[0] + CHECK * line[1]
    trained = list(row.handle.trainable_parameters())
    return MemoryPlan(
        config.model.name,
        method,
        weights=sum(t.nbytes for t in tensors.values()),
        trained=sum(p.numel() for p in trained),
        head=sum(p.numel() for _, p in row.handle.head_parameters() if p.requires_grad),
        gradients=sum(p.nbytes for p in trained),
        optimizer=optimizer_bytes(optim, trained),
        image=row.batch.images[0].nbytes,
        saved=line,
        peak=None if peaks[0] is None else _line(*peaks[:2]),
        off=abs(found - saved[2]) / max(saved[2], 1),
    )


def _line(first: int, second: int) -> tuple[float, float]:
    slope = (second - first) / (SMALL[1] - SMALL[0])
    return first - SMALL[0] * slope, slope


def _batch(config: DictConfig, batch: Batch, number: int) -> Batch:
    return Batch(
        config,
        batch.images[:1].expand(number, *batch.images.shape[1:]).contiguous(),
        torch.arange(number) % config.num_classes,
    )


def optimizer_bytes(name: str, trained: Sequence[torch.nn.Parameter]) -> int:
    """What an optimiser of timm keeps of each parameter, from its first step on, which is made without values.

    Raises:
        ConfigError: no such optimiser.
    """
    if not trained:
        return 0
    copies = [torch.nn.Parameter(torch.empty_like(p, device="meta")) for p in trained]
    try:
        optimizer = create_optimizer_v2(copies, opt=name, lr=1e-3, weight_decay=1e-4)
    except Exception as error:  # timm's own kinds
        raise ConfigError(f"--optim: timm cannot make '{name}': {error}") from error
    for copy in copies:
        copy.grad = torch.empty_like(copy)
    for _ in range(
        1 + optimizer.param_groups[0].get("lookahead_k", 0)
    ):  # timm's Lookahead keeps slow weights after its k-th
        optimizer.step()
    optimizer = getattr(optimizer, "_base_optimizer", optimizer)  # what Lookahead holds has the state
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))


def told(found: MemoryPlan, batch_sizes: Sequence[int], free: int | None, setting: str) -> str:
    """A plan for people.

    Args:
        found: the plan.
        batch_sizes: for each a line of the table.
        free: bytes that are free on the device; None where that says nothing.
        setting: precision, optimiser and device, in words.

    Raises:
        ConfigError: a batch without images.
    """
    for batch in batch_sizes:
        if batch < 1:
            raise ConfigError(f"--batch-size: {batch} is impossible; a batch has at least one image")
    head = ["batch", "weights", "gradients", "optimiser", "images", "saved", "sum, MiB", *(["fits"] if free else [])]
    options = ", ".join(f"{k}={v}" for k, v in found.method.options().items())
    lines = [
        f"{found.method.name}({options}) on {found.model}, {setting}",
        f"{found.trained - found.head:,} trained numbers of the method, {found.head:,} of the head",
        "",
        f"| {' | '.join(head)} |",
        "|---:" * len(head) + "|",
    ]
    for batch in batch_sizes:
        parts = (found.weights, found.gradients, found.optimizer, batch * found.image, found.saved_at(batch))
        cells = [str(batch), *(_mib(p) for p in (*parts, found.total_at(batch)))]
        if free:
            cells.append("yes" if found.total_at(batch) <= free else "no")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Saved for backward: {_mib(found.saved[0])} MiB and {_mib(found.saved[1])} MiB for each image, measured with "
        f"{SMALL[0]} and {SMALL[1]} images; with {CHECK} that was {100 * found.off:.2f} % off."
        + (" It is not linear in the batch: take the largest numbers as a guess." if found.off > 0.01 else ""),
    ]
    if found.method.needs_calibration:
        lines.append(
            "What it looks at in the data was random here, as the weights were: where that decides what is trained,"
        )
        lines.append("the saved bytes may be some percent off.")
    if found.peak is None:
        lines.append("Not in the sum: what backward needs for a while, and, on a GPU, torch's own share.")
    else:
        lines.append("The sum is the highest memory of a step, measured with the same images.")
    if free:
        each = found.total_at(1) - found.total_at(0)
        most = max(0, (free - found.total_at(0)) // max(each, 1))
        lines.append(f"Free there: {_mib(free)} MiB, enough for about {most:,} images.")
    return "\n".join(lines)


def free_bytes(device: str) -> int | None:
    """Of a GPU, what was measured there given back; None elsewhere."""
    if torch.device(device).type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(torch.device(device))[0]


def _mib(amount: float) -> str:
    return f"{amount / 2**20:,.1f}"
