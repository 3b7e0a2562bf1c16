"""torch.export, ONNX and torch.jit.trace: what leaves Python computes what the model with its hooks does, at any batch.

The sweep over every method: ``python -m pytest -m slow -s tests/interventions/test_export.py``.
"""

import copy
import inspect
import io
import re
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vpeft
from tests.support.models import CASES, attached, images, make, randomise
from vpeft.interventions.lookup import hub_of
from vpeft.tasks.video.model import FramewiseModel

BATCHES = (1, 3, 5)
BATCH = torch.export.Dim("batch", min=1, max=64)

# What cannot be exported, and why: (method, kind of model, how) to a part of the message.
REFUSED_EXPORT: dict[tuple[str, str, str], str] = {}


def ready(method: str, kind: str, merged: bool = False, **options) -> tuple[nn.Module, vpeft.Handle]:
    """A model with a method whose values are all moved, in eval mode."""
    model = make(kind)
    handle = attached(model, method, **options)
    randomise(handle, 0.1)
    handle.eval()
    return model, handle.merge() if merged else handle


def agrees(other: Callable[[Tensor], Tensor], model: nn.Module, batches: tuple[int, ...] = BATCHES) -> None:
    """The same numbers as the model's own, at several batches."""
    for batch in batches:
        x = images(model, batch, seed=20 + batch)
        with torch.no_grad():
            expected = model(x)
        found = other(x)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), batch


def exported(model: nn.Module, x: Tensor, dim=BATCH, **how) -> Callable[[Tensor], Tensor]:
    """Through torch.export, and a file."""
    program = torch.export.export(model, (x,), dynamic_shapes=({0: dim},), **how)
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    return torch.export.load(stream).module()


def through_onnx(model: nn.Module, x: Tensor, dim=BATCH) -> Callable[[Tensor], Tensor]:
    """Through an ONNX file, by onnxruntime."""
    import onnxruntime  # of the extra "export"

    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=({0: dim},), verbose=False).save(stream)
    session = onnxruntime.InferenceSession(stream.getvalue(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def traced(model: nn.Module, x: Tensor, **how) -> Callable[[Tensor], Tensor]:
    """Through torch.jit.trace, and a file."""
    stream = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x, **how), stream)
    stream.seek(0)
    return torch.jit.load(stream)


WAYS = {"torch.export": exported, "onnx": through_onnx, "jit.trace": lambda m, x: traced(m, x, check_trace=False)}


def unchanged(model: nn.Module) -> Callable[[], None]:
    """To be called later: the model computes what it does now, and no forward is under way."""
    x = images(model, 2)
    with torch.no_grad():
        before = model(x)
    names = {n: id(t) for n, t in model.state_dict(keep_vars=True).items()}

    def check() -> None:
        hub = hub_of(model)
        assert hub is None or (hub.now() is None and not hub.entered and not hub.carried)
        assert not torch.compiler.is_compiling()
        assert not torch.jit.is_tracing()
        assert {n: id(t) for n, t in model.state_dict(keep_vars=True).items()} == names
        with torch.no_grad():
            assert torch.equal(model(x), before)

    return check


# ---- the fast ones: methods that have something of their own on the way ----


@pytest.mark.parametrize(
    ("method", "kind", "batch", "grad"),
    [("fact_tk", "vit", 1, False), ("fact_tt", "vit", 4, True), ("evp", "vit", 1, False), ("evp", "vit", 4, True),
     ("increlora", "vit", 4, True), ("ssf", "vit", 4, True), ("vqt", "vit", 1, False), ("dtl", "vit", 4, True),
     ("vpt_deep", "swin", 4, False), ("unipelt", "swin", 1, False)],
)  # fmt: skip
def test_a_traced_model_takes_any_batch_and_is_saved(method, kind, batch, grad):
    model, _ = ready(method, kind)
    check = unchanged(model)
    with torch.set_grad_enabled(grad):
        other = traced(model, images(model, batch), check_trace=False)
    agrees(other, model)
    check()


def test_a_trace_is_checked_as_torch_does_by_default():
    model, _ = ready("prefix", "vit", form="perceptron")
    with torch.no_grad():
        model(images(model))  # keys and values are kept from here on
        agrees(traced(model, images(model, 4)), model)


def test_an_onnx_file_takes_any_batch():
    model, _ = ready("vpt_deep", "vit", blocks=[0, 1])
    agrees(through_onnx(model, images(model, 4)), model)


def test_the_handles_that_act_are_exported():
    model, first = ready("fact_tt", "vit")
    second = attached(model, "lora", name="second")
    randomise(second)
    model.eval()
    check, x = unchanged(model), images(model, 4)
    agrees(traced(model, x, check_trace=False), model)  # the second alone
    first.enable()
    agrees(traced(model, x, check_trace=False), model)
    second.disable()
    agrees(exported(model, x), model)
    first.disable()
    second.enable()
    check()


def test_a_failed_export_leaves_no_forward_behind():
    model, _ = ready("dtl", "vit")
    check = unchanged(model)

    def fail(*_) -> None:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            raise RuntimeError("stop here")

    removed = model.blocks[1].mlp.register_forward_hook(fail)
    for way in (exported, traced):
        with pytest.raises(Exception, match="stop here"):
            way(model, images(model, 4))
        check()
    removed.remove()
    agrees(traced(model, images(model, 4), check_trace=False), model)


def test_another_model_runs_while_one_is_exported():
    """On another thread: it starts before the export ends, and ends after it."""
    (model, _), (other, _) = ready("dtl", "vit"), ready("dtl", "vit")
    x, started, exporting_ended = images(other), threading.Event(), threading.Event()
    with torch.no_grad():
        expected = other(x)

    def wait(*_) -> None:
        started.set()
        exporting_ended.wait(60)

    def run() -> Tensor:
        with torch.no_grad():
            return other(x)

    def start(*_) -> None:
        running.append(pool.submit(run))
        started.wait(60)

    running: list[Future] = []
    other.blocks[1].register_forward_pre_hook(wait)
    removed = model.blocks[1].register_forward_pre_hook(start)
    with ThreadPoolExecutor(1) as pool:
        exported(model, images(model, 4))
        exporting_ended.set()
        found = running[0].result()
    removed.remove()
    assert torch.allclose(found, expected, atol=1e-6)  # not bit for bit: torch exports meanwhile


def test_clips_of_any_number():
    """How many frames a clip has is part of the exported program; how many clips there are is not."""
    frames = 2
    model, _ = ready("aim", "vit", frames=frames, blocks=[0])
    clips = torch.export.Dim("clips", min=1, max=16)
    x = images(model, 4 * frames)
    batches = tuple(n * frames for n in BATCHES)
    agrees(traced(model, x, check_trace=False), model, batches)
    agrees(exported(model, x, frames * clips), model, batches[1:])  # torch does not count a single clip in
    with pytest.raises(Exception, match=f"{frames}"):
        exported(model, x)(images(model, 3))


def test_what_a_module_lists_can_be_read_outside_a_forward():
    model, _ = ready("dtl", "vit")
    for module in model.modules():
        assert dict(inspect.getmembers(module))["training"] is False


# ---- the sweep ----


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True], ids=["hooked", "merged"])
@pytest.mark.parametrize(("method", "kind"), [(m, k) for m, k in CASES if k != "vit_reg"])
def test_every_method_leaves_python(method, kind, merged):
    model, handle = ready(method, kind)
    if merged and not handle.mergeable:
        return
    if merged:
        handle.merge()
    check, x = unchanged(model), images(model, 4)
    given = {"torch.export": (copy.deepcopy(model), x), "onnx": (model, x), "jit.trace": (model, x[:1])}
    for name, way in WAYS.items():
        reason = REFUSED_EXPORT.get((method, kind, name))
        if reason is None:
            agrees(way(*given[name]), model)
        else:
            with pytest.raises(Exception, match=reason):
                way(*given[name])
        check()
    if merged:
        agrees(exported(handle.detach(keep_merged=True), x), model)


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m, k in CASES if k == "vit"])
def test_every_method_exports_strictly(method):
    model, _ = ready(method, "vit")
    check = unchanged(model)
    agrees(exported(model, images(model, 4), strict=True), model)
    check()


SPECIAL = [
    ("dam_vp", {"head": "tuned"}), ("vp", {"classes": 3}),
    ("vp", {"variant": "random_patch"}), ("lora", {"dropout": 0.5}), ("fact_tt", {"dropout": 0.5}),
    ("adapter", {"dropout": 0.5}), ("prefix", {"form": "perceptron"}), ("aim", {"frames": 2, "num_t_adapters": 2}),
    ("st_adapter", {"frames": 2, "kernel": [3, 3, 3]}), ("e2vpt", {"share_kv": False, "kv_dropout": 0.5}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("method", "options"), SPECIAL, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v)))
@pytest.mark.parametrize("way", list(WAYS))
def test_options_that_change_the_way(method, options, way):
    model, _ = ready(method, "vit", **options)
    frames = options.get("frames", 1)
    x, batches = images(model, 4 * frames), tuple(n * frames for n in BATCHES)
    if way == "jit.trace" or frames == 1:
        agrees(WAYS[way](model, x), model, batches)
    else:
        other = WAYS[way](model, x, frames * torch.export.Dim("clips", min=1, max=16))
        agrees(other, model, batches[1:] if way == "torch.export" else batches)  # see the clips above


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lst", "vqt", "dtl", "ladder_adapter"])
def test_features_alone(method):
    """What the classifier's side still needs is no part of them."""

    class Features(nn.Module):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.model, self.patch_embed = model, model.patch_embed

        def forward(self, x: Tensor) -> Tensor:
            return self.model.forward_features(x)

    features = Features(ready(method, "vit")[0])
    x = images(features, 4)
    agrees(exported(features, x), features)
    agrees(traced(features, x, check_trace=False), features)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["aim", "st_adapter"])
def test_clips_in_a_dimension_of_their_own(method):
    model, _ = ready(method, "vit", frames=2)
    x = images(model, 8).unflatten(0, (4, 2))
    other = exported(nn.Sequential(nn.Flatten(0, 1), model), x)
    agrees(lambda rows: other(rows.unflatten(0, (-1, 2))), model, (2, 6, 10))


@pytest.mark.slow
@pytest.mark.parametrize("way", [exported, traced])
@pytest.mark.parametrize("pool", ["after", "before"])
@pytest.mark.parametrize("method", ["aim", "st_adapter"])
def test_video_models(method, pool, way):
    model, _ = ready(method, "vit", frames=2)
    whole = FramewiseModel(model, pool).eval()

    def clips(batch: int) -> Tensor:
        return images(model, 2 * batch).unflatten(0, (batch, 2)).transpose(1, 2)

    other = way(whole, clips(4))
    for batch in BATCHES:
        with torch.no_grad():
            expected = whole(clips(batch))
        assert (other(clips(batch)) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, scope)
    assert scope["logits"].shape == (5, 10)
    assert {p.name for p in tmp_path.iterdir()} >= {"model.pt2", "model.onnx", "model.ts"}
