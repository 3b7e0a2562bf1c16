"""torch.compile: one graph for all forwards, which knows who acts and what the caller says of a forward."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import vpeft
from tests.support.models import attached, images, make, randomise


@pytest.mark.parametrize("grad", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "method",
    [
        "adaptformer",
        "dtl",
        "fish",
        "lora",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("vpt_shallow", "vqt", "unipelt")),
    ],
)
def test_one_graph_serves_many_forwards(method, grad):
    model = make("vit")
    handle = attached(model, method)
    randomise(handle, 0.05)
    handle.eval()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.set_grad_enabled(grad):
        for seed in range(10):
            x = images(model, 3, seed=seed)
            assert torch.allclose(compiled(x), model(x), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1


def test_switching_is_seen():
    model = make("vit")
    x = images(model)
    with torch.no_grad():
        bare = model(x)
        handles = [attached(model, m, name=n) for m, n in (("lora", "one"), ("adaptformer", "two"))]
        for handle in handles:
            randomise(handle)
            handle.disable()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        seen = [bare]
        for chosen in ([], [0], [1], [0, 1], [0], []):
            for number, handle in enumerate(handles):
                handle.disable()
                if number in chosen:
                    handle.enable()
            seen.append(model(x))
            assert torch.allclose(compiled(x), seen[-1], atol=1e-5, rtol=1e-5)
        assert torch.equal(seen[1], bare)
        assert not any(torch.allclose(a, b, atol=1e-3) for a, b in ((seen[2], bare), (seen[3], seen[2]), (seen[4], seen[3])))


@pytest.mark.parametrize("fullgraph", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_method_that_comes_later_is_seen(fullgraph):
    """The graph was made where nothing acted and nothing was hooked: torch does not look whether hooks came since."""
    model = make("vit", depth=2)
    x = images(model)
    vpeft.attach(model, "bitfit").disable()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
    with torch.no_grad():
        seen = [model(x)]
        assert torch.allclose(compiled(x), seen[0], atol=1e-5, rtol=1e-5)
        for method in ("adaptformer", "lora"):
            handle = vpeft.attach(model, method, name="later")
            handle.requires_grad_(False)
            randomise(handle)
            seen.append(model(x))
            assert torch.allclose(compiled(x), seen[-1], atol=1e-5, rtol=1e-5)
            assert not torch.allclose(seen[-1], seen[-2], atol=1e-3)
            handle.detach()
            assert torch.allclose(compiled(x), seen[0], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_clip_lengths_are_seen():
    model = make("vit")
    randomise(vpeft.attach(model, "st_adapter", bottleneck=4))
    model.eval()
    rows = images(model, 6)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    with torch.no_grad():
        for frames in (1, 2, 3, 2, 1):
            with vpeft.clips(model, frames):
                found.append(model(rows))
                assert torch.allclose(compiled(rows), found[-1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-4)


@pytest.mark.parametrize("method", ["vpt_deep", "vqt", "evp", "unipelt"])
def test_an_exported_model_takes_any_batch(method):
    model = make("vit")
    randomise(attached(model, method))
    model.eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (images(model, 4),), dynamic_shapes=({0: batch},)).module()
    x = images(model, 7)
    with torch.no_grad():
        assert torch.allclose(exported(x), model(x), atol=1e-5)
