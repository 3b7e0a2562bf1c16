"""Batches of mixed tasks beside what else serves them: times, and how far their outputs are apart.

Every task has a handle of its own on one model, all with other values. Its samples are spread over the batch, every N-th one
of N tasks, which is the worst order for sorting. In evaluation four passes are timed, one after another in each round:

- ``single``: the whole batch by the first task's handle alone;
- ``routed``: the mixed batch under ``route``;
- ``switched``: one forward for each task, with its handle enabled for it and disabled again;
- ``copies``: one forward for each task, on a copy of the model (with the same frozen weights in memory) on which its handle
  is attached and enabled for good: no switching is paid.

In training ``step_single``, ``step_routed`` and ``step_copies``: forward, loss, backward, update. What is reported is a
throughput: the single-task time over the pass's, the median over the rounds of these ratios.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ..engine.plan import place
from ..errors import ConfigError, VpeftError
from ..methods import Method, create
from ..numerics import torch_threads
from ..tasks.protocol import TaskModel
from ..tuning.attaching import attach
from ..tuning.handle import Handle
from ..tuning.routing import route, train_side_by_side
from .config import PEFT, load_routing_config
from .result import RoutingResult
from .routing_report import write_routing_report
from .rows import Batch, classifier, peft_installed, twin

Passes = dict[str, Callable[[], Any]]
SPREAD = 0.02  # of the random values by which the tasks' tensors differ


def bench_route(file: str | Path, overrides: Sequence[str] = ()) -> list[RoutingResult]:
    """Measure what a configuration asks for; write ``OUTPUT/NAME.csv`` and ``.md`` after each row, and print the table."""
    config = load_routing_config(file, overrides)
    place(config)  # refuses names and places of no use, before anything is measured
    results, text = [], ""
    for row in measure_routing(config):
        results.append(row)
        text = write_routing_report(config, results)
    print(text)
    return results


def measure_routing(config: DictConfig) -> Iterator[RoutingResult]:
    """Every row's numbers, as they come.

    Raises:
        ConfigError: a row that cannot be, before anything is measured.
        UnsupportedModelError, MethodError: a method that this backbone does not take, or that ``route`` refuses; likewise.
    """
    methods = [None if row.name == PEFT else _method(row) for row in config.rows]
    labels = [row.label or row.name for row in config.rows]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"rows: two are called '{label}'; give one of them another label")
    groups = _groups(config, labels, methods)
    with torch_threads(config.threads):
        base, batch = classifier(config)
        base.model.to(config.device, getattr(torch, config.dtype)).eval()
        batch.images = batch.images.to(getattr(torch, config.dtype))
        for method in methods:
            if method is not None:
                _check_routable(method, base.model)
        for group in groups:
            yield from _measured(config, batch, [make(base, batch, config) for make in group])


def _method(row: DictConfig) -> Method:
    try:
        return create(row.name, **OmegaConf.to_container(row.options))
    except VpeftError as error:
        raise ConfigError(f"rows: {error}") from error


def _check_routable(method: Method, base: nn.Module) -> None:
    model = copy.deepcopy(base)
    with route(model, [attach(model, method, name="task")]):
        pass


def _groups(config: DictConfig, labels: list[str], methods: list[Method | None]) -> list[list[Callable]]:
    """What makes the rows of each group, whose passes are timed in the same rounds."""
    groups: list[list[Callable]] = []
    for row, label, method in zip(config.rows, labels, methods, strict=True):
        if method is None:
            options = _peft_options(row)
            groups[-1].append(lambda *where, n=label, o=options: PeftMixed(n, *where, **o))
        else:
            groups.append([lambda *where, n=label, m=method: Mixed(n, *where, m)])
    return groups


def _peft_options(row: DictConfig) -> dict[str, Any]:
    options = {"rank": 8, "targets": ["qkv"], "alpha": 8.0}
    given = OmegaConf.to_container(row.options)
    if given.keys() - options.keys():
        raise ConfigError(f"rows: {PEFT} has no option '{min(given.keys() - options.keys())}'; it has {', '.join(options)}")
    if not peft_installed():
        raise ConfigError(f"rows: '{PEFT}' needs huggingface's peft; install it with: pip install vpeft[bench]")
    return options | given


# ---- what is timed ----


class Mixed:
    """One method on one model, once for every task."""

    def __init__(self, label: str, base: TaskModel, batch: Batch, config: DictConfig, method: Method):
        self.label, self.batch, self.config, self.method = label, batch, config, method
        self.names = [f"task{i}" for i in range(config.tasks)]
        self.tasks = [self.names[i % config.tasks] for i in range(config.batch_size)]
        self.images = [batch.images[i :: config.tasks].contiguous() for i in range(config.tasks)]
        widths = list(config.widths) or [config.num_classes]
        self.widths = [widths[i % len(widths)] for i in range(config.tasks)]
        self.labels = [batch.labels[i] % self.widths[i % config.tasks] for i in range(config.batch_size)]
        self.make(base)

    def make(self, base: TaskModel) -> None:
        self.model = copy.deepcopy(base.model)
        self.handles = [self.attached(self.model, i) for i in range(self.config.tasks)]
        needed = len(self.names) if self.config.separate or self.config.training else 0
        self.copies = [twin(base).model for _ in range(needed)]
        self.alone = [self.attached(model, i) for i, model in enumerate(self.copies)]
        for handle in self.handles:
            handle.disable()
        self.optimizers: dict[Any, torch.optim.Optimizer] = {}

    def attached(self, model: nn.Module, i: int) -> Handle:
        """The i-th task's handle, with values and a head of its own."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.config.seed + i)
            handle = attach(model, self.method, name=self.names[i])
            if self.widths[i] != self.config.num_classes:
                model.reset_classifier(self.widths[i])
            with torch.enable_grad():
                handle.calibrate([(self.batch.images, self.batch.labels % self.widths[i])], progress=False)
            for _, p in [*handle.named_parameters(), *handle.head_parameters()]:
                p.data = p + SPREAD * torch.randn(p.shape, dtype=p.dtype).to(p.device)  # twins share what was there
        return handle.eval()

    @property
    def parameters(self) -> int:
        """Of one task, the head's left out."""
        return sum(p.numel() for p in self.handles[0].parameters())

    # In evaluation.

    def passes(self) -> Passes:
        """By name, in the order in which they are timed."""
        two = {"single": self.single, "routed": self.routed}
        return two | {"switched": self.switched, "copies": self.on_copies} if self.config.separate else two

    @torch.no_grad()
    def single(self) -> Tensor:
        with self.handles[0].enable(), self.batch.precision():
            return self.model(self.batch.images)

    @torch.no_grad()
    def routed(self) -> Any:
        with route(self.model, self.tasks), self.batch.precision():
            return self.model(self.batch.images)

    @torch.no_grad()
    def switched(self) -> list[Tensor]:
        found = []
        for handle, images in zip(self.handles, self.images, strict=True):
            with handle.enable(), self.batch.precision():
                found.append(self.model(images))
        return found

    @torch.no_grad()
    def on_copies(self) -> list[Tensor]:
        with self.batch.precision():
            return [model(images) for model, images in zip(self.copies, self.images, strict=True)]

    def difference(self) -> float:
        """The largest one between the mixed batch and the separate forwards."""
        mixed, found = self.routed(), 0.0
        for i, outputs in enumerate(self.switched()):
            for own, wanted in zip(mixed[i :: self.config.tasks], outputs, strict=True):
                found = max(found, (own - wanted).abs().max().item())
        return found

    # In training. Copies have one task each, so that no mode has to be changed between the passes.

    def steps(self) -> Passes:
        """As ``passes``, of a training step."""
        if not self.optimizers:
            for handle in train_side_by_side(self.model):
                handle.train()
            for handle in self.alone:
                handle.train()
        return {"step_single": self.step_single, "step_routed": self.step_routed, "step_copies": self.step_copies}

    def step_single(self) -> None:
        labels = torch.stack(self.labels) % self.widths[0]
        self.step("single", [self.alone[0]], lambda: self.copies[0](self.batch.images), labels)

    def step_routed(self) -> None:
        with route(self.model, self.tasks):
            self.step("routed", self.handles, lambda: self.model(self.batch.images), torch.stack(self.labels))

    def step_copies(self) -> None:
        for i, (handle, images) in enumerate(zip(self.alone, self.images, strict=True)):
            labels = torch.stack(self.labels[i :: self.config.tasks])
            self.step(i, [handle], lambda i=i, images=images: self.copies[i](images), labels)

    def step(self, key: Any, handles: list[Handle], forward: Callable[[], Any], labels: Tensor) -> None:
        """Forward, the mean cross-entropy of the samples, backward, and AdamW's update at a rate of 0."""
        if key not in self.optimizers:
            groups = [group for handle in handles for group in handle.param_groups(lr=0.0)]
            self.optimizers[key] = torch.optim.AdamW(groups, lr=0.0, fused=True)
        with self.batch.precision():
            out = forward()
            if isinstance(out, Tensor):
                loss = nn.functional.cross_entropy(out, labels)
            else:
                loss = torch.stack([nn.functional.cross_entropy(o, c) for o, c in zip(out, labels, strict=True)]).mean()
        loss.backward()
        self.optimizers[key].step()
        self.optimizers[key].zero_grad()


class PeftMixed(Mixed):
    """LoRA of huggingface's peft on the same model; its mixed batch is ``adapter_names`` in the forward."""

    def __init__(self, label: str, base: TaskModel, batch: Batch, config: DictConfig, **options: Any):
        self.options = options
        super().__init__(label, base, batch, config, None)

    def make(self, base: TaskModel) -> None:
        from peft import LoraConfig, get_peft_model

        if len(set(self.widths)) > 1:
            raise ConfigError(f"rows: '{PEFT}' copies the model's classifier for each task; its heads are equally wide")
        model = twin(base).model
        head = [n for n, m in model.named_modules() if m is model.get_classifier()]
        made = LoraConfig(
            r=self.options["rank"], lora_alpha=self.options["alpha"], target_modules=self.options["targets"],
            modules_to_save=head,
        )  # fmt: skip
        self.model = get_peft_model(model, made, adapter_name=self.names[0])
        for name in self.names[1:]:
            self.model.add_adapter(name, made)
        generator = torch.Generator().manual_seed(self.config.seed)
        for name, p in self.model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.data = p + SPREAD * torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
        self.model.eval()

    @property
    def parameters(self) -> int:
        own = [p for n, p in self.model.named_parameters() if "lora_" in n and f".{self.names[0]}." in n]
        return sum(p.numel() for p in own)

    def passes(self) -> Passes:
        two = {"single": self.single, "routed": self.routed}
        return two | {"switched": self.switched} if self.config.separate else two

    def steps(self) -> Passes:
        return {}  # it refuses mixed batches in training

    @torch.no_grad()
    def single(self) -> Tensor:
        self.model.set_adapter(self.names[0])
        with self.batch.precision():
            return self.model(self.batch.images)

    @torch.no_grad()
    def routed(self) -> Tensor:
        with self.batch.precision():
            return self.model(self.batch.images, adapter_names=self.tasks)

    @torch.no_grad()
    def switched(self) -> list[Tensor]:
        found = []
        for name, images in zip(self.names, self.images, strict=True):
            self.model.set_adapter(name)
            with self.batch.precision():
                found.append(self.model(images))
        return found


# ---- rounds and medians ----

Times = dict[tuple[str, str], float]


def _measured(config: DictConfig, batch: Batch, rows: list[Mixed]) -> Iterator[RoutingResult]:
    differences = {row.label: row.difference() for row in rows}
    times = _rounds(config, batch, [(row.label, row.passes()) for row in rows])
    steps = _rounds(config, batch, [(row.label, row.steps()) for row in rows]) if config.training else []
    for i, row in enumerate(rows):
        found = _throughputs(row.label, times, "single") | _throughputs(row.label, steps, "step_single")
        if i:
            above = (rows[i - 1].label, "routed")
            found["mixed/above"] = median(t[above] / t[row.label, "routed"] for t in times)
        names = [p for label, p in [*times[0], *(steps[0] if steps else ())] if label == row.label]
        middle = {p: median(t[row.label, p] for t in (steps if p.startswith("step") else times)) for p in names}
        yield RoutingResult(row.label, row.parameters, middle, found, differences[row.label])


def _rounds(config: DictConfig, batch: Batch, rows: list[tuple[str, Passes]]) -> list[Times]:
    """In each round all passes one after another, beginning with another one every time."""
    passes = [((label, name), run) for label, own in rows for name, run in own.items()]
    found = []
    for n in range(config.warmup + config.rounds):
        turn = n % len(passes)
        found.append({key: batch.time(run) for key, run in passes[turn:] + passes[:turn]})
    return found[config.warmup :]


def _throughputs(label: str, times: list[Times], base: str) -> dict[str, float]:
    names = [name for whose, name in (times[0] if times else ()) if whose == label and name != base]
    return {name: median(t[label, base] / t[label, name] for t in times) for name in names}
