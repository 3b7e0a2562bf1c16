"""What each of two processes does: ``python -m tests.distributed.worker RESULTS CASE...``, in the order that is given.

The first process writes, by case, "ok" or the error. A case is ``function:setting:method:kind``.
"""

import copy
import json
import re
import sys
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import vpeft
from tests.support.models import attached, images, make
from vpeft import checkpoint
from vpeft.engine.config import from_container
from vpeft.engine.setup import make_accelerator
from vpeft.methods.supernet import choose, sliced_state, sub_network

# Options with which a method does in few steps, and equally in one process and two, what it is known for: EVP takes directions
# of gradients, and IncreLoRA absolute values, in each process (their pages say so).
OPTIONS = {"delta_lora": {"start": 2}, "evp": {"normalise": False}, "increlora": {"warmup": 100}}
Y = torch.tensor([0, 1, 2, 3])


class Run:
    """A model with a method and SGD, on half of each batch in each of two processes, or on all of it in one.

    Args:
        setting: ``one`` process; ``ddp``; ``blocks``, each a unit, and the model; ``root``, the model as one unit; ``small``,
            every module above 800 numbers, as accelerate's ``size_based_wrap``; ``accelerate``: FSDP2 through it.
    """

    def __init__(self, setting: str, method: str, kind: str, seed: int = 5):
        self.setting, self.method, self.kind = setting, method, kind
        self.model = make(kind, dtype=torch.float64)
        torch.manual_seed(seed)
        self.handle = attached(self.model, method, **OPTIONS.get(method, {}))
        self.handle.eval()  # without dropout, so that one process and two agree
        self.x = images(self.model, 4)
        self.mine = slice(None) if setting == "one" else slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
        self.outer, self.accelerator = self.model, None
        if setting == "accelerate":
            self.accelerator = with_fsdp2(type(blocks_of(self.model)[0]).__name__)
            optimizer = self.sgd()
            self.outer, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        else:
            self.wrap()
            self.optimizer = self.sgd()

    def sgd(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.handle.param_groups(lr=0.05), momentum=0.9)

    def wrap(self) -> None:
        if self.setting == "ddp":
            self.outer = DistributedDataParallel(self.model)
        if self.setting == "blocks":
            shard_blocks(self.model)
        if self.setting == "small":
            for module in list(self.model.modules())[:0:-1]:
                if sum(p.numel() for p in module.parameters()) > 800:
                    fully_shard(module)
        if self.setting in ("blocks", "small", "root"):
            fully_shard(self.model)

    def steps(self, count: int) -> "Run":
        for _ in range(count):
            x, y = self.x[self.mine], Y[self.mine]
            logits = self.outer(x)
            loss = F.cross_entropy(logits, y) + self.handle.penalty()
            if self.handle.method.compares_runs:
                loss = loss + self.handle.consistency_loss(logits, self.outer(x))
            loss.backward()
            self.optimizer.step()
            self.handle.after_step()
            self.optimizer.zero_grad()
        return self

    def logits(self) -> Tensor:
        with torch.no_grad():
            return self.outer(self.x)


def with_fsdp2(block: str = "Block") -> Accelerator:
    """accelerate takes up FSDP2 on accelerators only; its code for it runs on a CPU too."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    for state in (accelerator.state, PartialState()):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=[block]
    )
    return accelerator


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return list(model.blocks) if hasattr(model, "blocks") else [b for layer in model.layers for b in layer.blocks]


def shard_blocks(model: nn.Module) -> None:
    for block in blocks_of(model):
        fully_shard(block)


def near(a: Tensor, b: Tensor, what: str, tolerance: float = 1e-10) -> None:
    assert a.shape == b.shape, what
    assert torch.allclose(a.double(), b.double(), rtol=0, atol=tolerance), f"{what}: {(a - b).abs().max()}"


def same_file(path: Path, other: Path) -> None:
    """Metadata (with the fingerprint), names and, up to rounding, values."""
    a, b = checkpoint.read(path), checkpoint.read(other)
    assert a.metadata == b.metadata
    assert a.tensors.keys() == b.tensors.keys()
    for name in a.tensors:
        if name.endswith((".score", ".sensitivity", ".uncertainty")):
            continue  # IncreLoRA's, of absolute values in each process: ``growth`` compares DDP and shards
        near(a.tensors[name], b.tensors[name], name, 1e-6 if a.tensors[name].dtype == torch.float32 else 1e-10)


def train_save_load(folder: Path, setting: str, method: str, kind: str) -> None:
    """Two processes train what one does, write the file that one writes, and take its values in again."""
    one = Run("one", method, kind)
    alone = one.steps(3).logits()
    one.handle.save(folder / f"one{dist.get_rank()}.safetensors")
    with one.handle.disable():
        off = one.logits()
    run = Run(setting, method, kind).steps(3)
    near(run.logits(), alone, "logits")
    if dist.get_rank() == 0:
        assert method in repr(run.handle)  # one process may print
    path = run.handle.save(folder / "two.safetensors")
    dist.barrier()
    same_file(path, folder / f"one{dist.get_rank()}.safetensors")
    fresh = make(kind, dtype=torch.float64)
    vpeft.load(fresh, path).eval()
    with torch.no_grad():
        near(fresh(run.x), alone, "loaded")
    state = {n: t.clone() for n, t in (run.handle.state_dict() | run.handle.head_state_dict()).items()}
    run.steps(1)
    changed = run.logits()
    with run.handle.disable():
        near(run.logits(), off, "switched off")
    near(run.logits(), changed, "switched on")
    run.handle.load_state_dict(state)
    near(run.logits(), alone, "taken back")
    if run.handle.mergeable:
        run.handle.merge()
        near(run.logits(), alone, "merged", 1e-6)
        run.handle.unmerge()
        near(run.logits(), alone, "unmerged")
    again = Run(setting, method, kind)
    again.handle.load_state_dict(state)
    near(again.logits(), alone, "taken into fresh shards")
    again.handle.detach()
    near(again.logits(), off, "detached")


def resume(folder: Path, setting: str, method: str, kind: str) -> None:
    """A run that is continued from a saved state ends where an uninterrupted one does."""
    end = Run("one", method, kind).steps(5).logits()
    run, again = Run(setting, method, kind).steps(3), None
    if setting == "accelerate":
        run.accelerator.save_state(folder / "state")
        near(run.steps(2).logits(), end, "uninterrupted")
        again = Run(setting, method, kind)
        again.accelerator.load_state(folder / "state")
    else:
        states = copy.deepcopy(get_state_dict(run.outer, run.optimizer))
        near(run.steps(2).logits(), end, "uninterrupted")
        again = Run(setting, method, kind)
        set_state_dict(again.outer, again.optimizer, model_state_dict=states[0], optim_state_dict=states[1])
    near(again.steps(2).logits(), end, "continued")


def refused(function, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        function()


def refusals(folder: Path, setting: str, method: str, kind: str) -> None:
    """What cannot work in shards says so, in every process, and changes nothing."""
    run = Run(setting, method, kind).steps(1)
    before, names = run.logits(), list(run.model.state_dict())
    path = run.handle.save(folder / "refusals.safetensors")
    dist.barrier()
    refused(lambda: vpeft.attach(run.model, "lora", name="second"), vpeft.UnsupportedModelError, "attach or load first")
    refused(lambda: vpeft.load(run.model, path, name="second"), vpeft.UnsupportedModelError, "attach or load first")
    refused(lambda: run.model.reset_classifier(7), vpeft.MethodError, "before fully_shard")
    refused(lambda: run.handle.calibrate([(run.x, Y)]), vpeft.MethodError, "calibrate before fully_shard")
    state = run.handle.state_dict()
    name = next(n for n in state if n.endswith(".value") and state[n].numel())
    index = f"{name.removesuffix('value')}index"
    refused(
        lambda: run.handle.load_state_dict(state | {name: state[name][:1], index: state[index][:1]}),
        vpeft.CheckpointError, "its size depends on data",
    )  # fmt: skip
    assert list(run.model.state_dict()) == names
    near(run.logits(), before, "after refusals", 0)


def no_unit(folder: Path, setting: str, method: str, kind: str) -> None:
    """Trained parameters outside of every unit would drift apart."""
    model = make(kind)
    handle = attached(model, method)
    shard_blocks(model)
    refused(lambda: handle.param_groups(lr=0.1), vpeft.MethodError, "is in no unit")
    refused(lambda: list(handle.trainable_parameters()), vpeft.MethodError, "is in no unit")
    refused(lambda: handle.save(folder / "no_unit.safetensors"), vpeft.MethodError, "is in no unit")


def unlike(folder: Path, setting: str, method: str, kind: str) -> None:
    """Buffers that differ between processes, after different seeds, are not written as if they were the same."""
    run = Run(setting, method, kind, seed=dist.get_rank())
    refused(lambda: run.handle.save(folder / "unlike.safetensors"), vpeft.CheckpointError, "seed all of them alike")
    assert not (folder / "unlike.safetensors").exists()


def cannot_write(folder: Path, setting: str, method: str, kind: str) -> None:
    """Where the first process cannot write, all fail, and none waits for ever."""
    run = Run(setting, method, kind)
    (folder / "taken").mkdir(exist_ok=True)
    first = dist.get_rank() == 0
    text = "is a folder" if first else "the first process could not write it"
    refused(lambda: run.handle.save(folder / ("taken" if first else "free")), vpeft.CheckpointError, text)
    assert not (folder / "free").exists()


def one_unit_for_all_blocks(folder: Path, setting: str, method: str, kind: str) -> None:
    """Rows that go through a block behind its forward need the block's own unit."""
    model = make(kind, dtype=torch.float64)
    attached(model, method)
    fully_shard(model.blocks)
    fully_shard(model)
    refused(lambda: model(images(model)), vpeft.MethodError, "call fully_shard on each block")


def fsdp1(folder: Path, setting: str, method: str, kind: str) -> None:
    """Parameters that FSDP1 has flattened are not written as if they were whole."""
    model = make(kind)
    handle = attached(model, method)
    FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    refused(lambda: handle.save(folder / "fsdp1.safetensors"), vpeft.MethodError, "FSDP1")


def drawn_together(folder: Path, setting: str, method: str, kind: str) -> None:
    """In training all processes have the sub-network that one process has, step by step; also one that is chosen."""
    modules = [
        {"method": "adaptformer", "option": "bottleneck", "values": [2, 4], "depths": [1, 2, 3], "dropout": 0.0},
        {"method": "lora", "option": "rank", "values": [1, 3], "depths": [1, 2, 3]},
        {"method": "vpt_deep", "option": "tokens", "values": [1, 2], "depths": [1, 2, 3]},
    ]
    runs = []
    for name in ("one", setting):
        OPTIONS[method] = {"modules": modules}
        run = Run(name, method, kind)
        run.handle.train()
        seen = []
        for _ in range(4):
            seen.append(sub_network(run.handle.root).acting)
            run.steps(1)
        run.handle.eval()
        choose(run.handle.root, seen[0])
        runs.append((run, seen, run.logits()))
    (one, drawn, logits), (run, again, found) = runs
    assert drawn == again
    assert len({str(network) for network in drawn}) > 2
    near(logits, found, "logits of a chosen one")
    expected = sliced_state(one.handle.root, drawn[1])
    for name, value in sliced_state(run.handle.root, drawn[1]).items():
        near(expected[name], value, name)
    one.handle.save(folder / f"drawn{dist.get_rank()}.safetensors")
    run.handle.save(folder / "drawn.safetensors")
    dist.barrier()
    same_file(folder / "drawn0.safetensors", folder / "drawn.safetensors")


def drawn_apart(folder: Path, setting: str, method: str, kind: str) -> None:
    """Parts that each process leaves out by a draw of its own: all train, and hold the same afterwards."""
    OPTIONS["adapterdrop"] = {"robust": True}
    run = Run(setting, method, kind)
    run.handle.train()
    torch.manual_seed(dist.get_rank())
    draws = torch.zeros(2, 6, dtype=torch.int64)
    for i in range(6):
        run.steps(1)
        if method == "adapterdrop":
            draws[dist.get_rank(), i] = run.handle.root.get_submodule("adapterdrop").now
    dist.all_reduce(draws)
    assert method != "adapterdrop" or not draws[0].equal(draws[1])
    run.handle.eval()
    mine = run.logits()
    first = mine.clone()
    dist.broadcast(first, 0)
    near(mine, first, "between processes", 0)


class Decoder(nn.Module):
    """A model of one's own around the backbone, whose features it takes, with a head outside of the backbone."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.num_features, 5, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone.forward_features(x).mean(1))


class OuterRun(Run):
    """The same, with a head outside of the backbone: the root unit is the module around both."""

    def wrap(self) -> None:
        self.model = Decoder(make(self.kind, dtype=torch.float64))
        self.handle = vpeft.attach(self.model.backbone, self.method, heads={"decoder": self.model.head})
        self.handle.eval()
        self.outer = self.model
        if self.setting == "blocks":
            shard_blocks(self.model.backbone)
        if self.setting == "small":
            fully_shard(self.model.backbone.vpeft)
        if self.setting != "one":
            fully_shard(self.model)


def around(folder: Path, setting: str, method: str, kind: str) -> None:
    """The root unit may be a module around the backbone."""
    torch.manual_seed(3)
    one = OuterRun("one", method, kind).steps(3)
    alone = one.logits()
    one.handle.save(folder / f"one{dist.get_rank()}.safetensors")
    run = OuterRun(setting, method, kind).steps(3)
    near(run.logits(), alone, "logits")
    state = run.handle.state_dict() | run.handle.head_state_dict()  # a forward has just left the root's parameters whole
    path = run.handle.save(folder / "two.safetensors")
    same_file(path, folder / f"one{dist.get_rank()}.safetensors")
    run.logits()
    with run.handle.disable():
        assert (run.logits() - alone).abs().max() > 1e-6
    near(run.logits(), alone, "switched back")
    run.steps(1)
    run.logits()
    run.handle.load_state_dict(state)
    near(run.logits(), alone, "taken back")


def every_epoch(folder: Path, setting: str, method: str, kind: str) -> None:
    """A method that looks at data in every epoch does so in shards."""
    maps = []
    for way in ("one", setting):
        run = Run(way, method, kind).steps(2)
        run.handle.calibrate([(run.x, Y)], progress=False)
        maps.append((run.handle.state_dict()[f"{method}.map"], run.steps(1).logits()))
    assert maps[0][0].equal(maps[1][0])
    near(maps[0][1], maps[1][1], "logits")


def growth(folder: Path, setting: str, method: str, kind: str) -> None:
    """IncreLoRA gives the same rows in the same order in shards as under DDP, where scores are also means over processes."""
    OPTIONS["increlora"] = {"warmup": 1, "interval": 1, "top": 2}
    states = [Run(way, method, kind).steps(6).handle.state_dict() for way in ("ddp", setting)]
    for name in states[0]:
        near(states[0][name], states[1][name], name)
    assert len({int(t) for n, t in states[0].items() if n.endswith(".rank")}) > 1


def engine(folder: Path, setting: str, method: str, kind: str) -> None:
    """``vpeft train`` is for DDP; it says so before it reads data."""
    with_fsdp2()
    refused(lambda: make_accelerator(from_container({})), vpeft.ConfigError, "docs/distributed.md")


def main(results: Path, cases: list[str]) -> None:
    dist.init_process_group("gloo")
    found, options = {}, dict(OPTIONS)
    for case in cases:
        OPTIONS.update(options)
        function, *rest = case.split(":")
        folder = results.parent / case.replace(":", "_")
        folder.mkdir(exist_ok=True)
        try:
            globals()[function](folder, *rest)
            found[case] = "ok"
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            found[case] = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        if dist.get_rank() == 0:
            results.write_text(json.dumps(found))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
