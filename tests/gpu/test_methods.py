"""What only a GPU shows: every method there gives what it gives on the CPU, in every way that people train and serve."""

import copy
import warnings

import pytest
import torch
from torch import nn

import vpeft
from tests.support.models import CASES, attached, images, make, randomise

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
WAITS = {"ssf": 1}  # whether a scale is near zero decides what is kept for backward
EVERY = pytest.mark.parametrize(("method", "kind"), CASES)
ON_VIT = pytest.mark.parametrize("method", [m for m, k in CASES if k == "vit"])
MAIN = ("lora", "adaptformer", "vpt_deep", "ssf", "convpass", "fact_tt", "bitfit", "prefix", "lst", "dtl", "fish", "e2vpt")


def adapted(method: str, kind: str, dtype: torch.dtype = torch.float32, std: float = 0.05) -> tuple[nn.Module, vpeft.Handle]:
    """A small model on the CPU with a method whose tensors are no longer at their start."""
    model = make(kind, dtype=dtype)
    handle = attached(model, method)
    randomise(handle, std)
    handle.eval()
    return model, handle


def step(model: nn.Module, handle: vpeft.Handle, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits, and the gradients of all that is trained."""
    logits = model(x)
    labels = torch.arange(len(x), device=x.device) % logits.shape[-1]
    (nn.functional.cross_entropy(logits.float() if logits.dtype is not torch.float64 else logits, labels)).backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in handle.trainable_parameters()]
    for p in handle.trainable_parameters():
        p.grad = None
    return logits.detach(), found


def same(a: list[torch.Tensor], b: list[torch.Tensor], tolerance: float) -> bool:
    """Whether two lists are equal up to a part of the largest number of each."""
    return len(a) == len(b) and all(
        bool((x.cpu() - y.cpu()).abs().max() <= tolerance * (1 + y.abs().max().cpu()))
        for x, y in zip(a, b, strict=True)
        if x.numel()
    )


@EVERY
def test_a_saved_handle_gives_the_same_on_a_gpu(tmp_path, method, kind):
    model, handle = adapted(method, kind, torch.float64)
    there = make(kind, dtype=torch.float64).to(GPU)
    loaded = vpeft.load(there, handle.save(tmp_path / "a.safetensors", training=True))
    loaded.eval()
    x = images(model)
    logits, gradients = step(model, handle, x)
    found, theirs = step(there, loaded, x.to(GPU))
    assert found.device.type == "cuda"
    assert all(p.device.type == "cuda" for p in loaded.parameters())
    assert same([found], [logits], 1e-9)
    assert same(theirs, gradients, 1e-9)


@EVERY
def test_a_model_is_moved_there_and_back(method, kind):
    model, handle = adapted(method, kind)
    x = images(model)
    with torch.no_grad():
        before = model(x)
        model.to(GPU)
        assert same([model(x.to(GPU))], [before], 2e-3)
        model.cpu()
        assert torch.equal(model(x), before)
    assert handle.enabled


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains(method, kind, dtype):
    """Autocast, the loss scaled for fp16, a fused optimiser, channels_last, pinned batches."""
    model = make(kind).to(GPU, memory_format=torch.channels_last)
    handle = attached(model, method)  # which calibrates with batches of the CPU
    handle.train()
    x, labels = images(model, 8, seed=11).pin_memory(), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    x, labels = x.to(GPU, non_blocking=True, memory_format=torch.channels_last), labels.to(GPU)
    optimizer = torch.optim.AdamW(handle.param_groups(lr=1e-2, weight_decay=0.05), fused=True)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16, init_scale=256.0)
    before = [p.detach().clone() for p in handle.trainable_parameters()]
    for _ in range(3):
        with torch.autocast("cuda", dtype):
            loss = nn.functional.cross_entropy(model(x), labels) + handle.penalty()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        handle.after_step()
        optimizer.zero_grad()
        assert torch.isfinite(loss)
    after = list(handle.trainable_parameters())
    assert all(torch.isfinite(p).all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


@EVERY
def test_checkpointed_blocks_give_the_same_gradients(method, kind):
    """Blocks are recomputed on autograd's own thread of the device."""
    model, handle = adapted(method, kind, torch.float64)
    x = images(model).to(GPU)
    model.to(GPU)
    plain = step(model, handle, x)
    model.set_grad_checkpointing(True)
    again = step(model, handle, x)
    assert same([again[0]], [plain[0]], 1e-10)
    assert same(again[1], plain[1], 1e-10)


@EVERY
def test_a_step_never_waits_for_the_device(method, kind):
    """No value is read back in forward or backward: such a wait costs more than the adapter."""
    model, handle = adapted(method, kind)
    x = images(model).to(GPU)
    model.to(GPU)
    labels = torch.arange(len(x), device=GPU)
    step(model, handle, x)  # what is made once is made
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        for train in (False, True):
            handle.train(train)
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                (nn.functional.cross_entropy(model(x), labels) + handle.penalty()).backward()
            assert sum("synchronizing" in str(w.message) for w in waits) == WAITS.get(method, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@EVERY
def test_a_forward_is_captured_as_a_graph(method, kind):
    """Hooked, and merged where the method folds in."""
    model, handle = adapted(method, kind)
    x, other = (images(model, seed=s).to(GPU) for s in (1, 2))
    model.to(GPU)
    for merged in (False, True):
        if merged:
            if not handle.mergeable:
                continue
            handle.merge()
        with torch.no_grad():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    model(x)
            torch.cuda.current_stream().wait_stream(side)
            held, graph = x.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = model(held)
            held.copy_(other)
            graph.replay()
            assert same([y], [model(other)], 1e-4)


@pytest.mark.parametrize(("method", "kind"), [c for c in CASES if c[0] in MAIN and c[1] != "vit_reg"])
def test_compiled_for_the_device(method, kind):
    model, handle = adapted(method, kind)
    x = images(model).to(GPU)
    model.to(GPU)
    logits, gradients = step(model, handle, x)
    torch._dynamo.reset()
    compiled = torch.compile(model)
    found, theirs = step(compiled, handle, x)
    assert same([found], [logits], 1e-3)
    assert same(theirs, gradients, 1e-2)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        assert same([compiled(x).float()], [model(x).float()], 5e-2)


@pytest.mark.parametrize("method", ["bitfit", "norm", "fish", "difffit", "ssf"])
def test_a_norm_of_many_rows(method):
    """More than 65,536 rows, where torch has other code for a norm whose weight is frozen."""
    model, handle = adapted(method, "vit")
    model.to(GPU)
    x = images(model, 4100).to(GPU)  # the labels of each quarter are those of the whole
    whole = step(model, handle, x)[1]
    parts = [step(model, handle, part)[1] for part in x.view(4, -1, *x.shape[1:])]
    for a, b in zip(whole, (torch.stack(g).mean(0) for g in zip(*parts, strict=True)), strict=True):
        assert (a - b).abs().max() <= 1e-3 * b.abs().max() + 1e-6


@ON_VIT
def test_a_copy_lives_on_the_device(method):
    model, _ = adapted(method, "vit")
    x = images(model)
    twin = copy.deepcopy(model).to(GPU)
    with torch.no_grad():
        assert same([twin(x.to(GPU))], [model(x)], 2e-3)
