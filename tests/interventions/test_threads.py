"""One adapted model serves several threads at once: each gets, bit for bit, what it would get alone."""

import copy
import sys
import threading

import pytest
import torch

import vpeft
from tests.support.models import SHORT_SWEEP, attached, images, make, randomise

sweep = pytest.mark.parametrize(("method", "kind"), SHORT_SWEEP)


@pytest.fixture(autouse=True)
def nervous():
    """Threads change places as often as Python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(count: int, work) -> list:
    """Results of ``work(number)`` in so many threads that start at once."""
    barrier, results = threading.Barrier(count), [None] * count

    def run(number: int) -> None:
        barrier.wait()
        try:
            results[number] = work(number)
        except Exception as error:  # shown by the comparison
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@sweep
def test_threads_do_not_meet(method, kind):
    model = make(kind)
    handle = attached(model, method)
    randomise(handle)
    handle.eval()
    frozen = {n: t.clone() for n, t in model.state_dict().items()}
    batches = [[images(model, 1 + (number + turn) % 3, seed=10 * number + turn) for turn in range(3)] for number in range(4)]

    def forwards(number: int) -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(x) for x in batches[number]]

    expected = [forwards(number) for number in range(4)]
    for count in (2, 4):
        for mine, alone in zip(together(count, forwards), expected, strict=False):
            assert not isinstance(mine, Exception), mine
            assert all(torch.equal(a, b) for a, b in zip(mine, alone, strict=True))
    assert all(torch.equal(t, frozen[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("method", "kind"), [("mona", "vit"), ("convpass", "swin"), ("dtl_plus", "vit"), ("st_adapter", "vit")]
)
def test_threads_have_image_sizes_of_their_own(method, kind):
    options = {"dynamic_img_size": True} if kind == "vit" else {"strict_img_size": False}
    model = make(kind, **options)
    randomise(attached(model, method))
    model.eval()
    side = model.patch_embed.img_size[0]
    sizes = [(side, side), (side, side + 16), (side + 16, side), (side + 16, side + 16)]
    if kind == "swin":  # of the model's own windows
        sizes = [(side, side), (side, 2 * side), (2 * side, side), (2 * side, 2 * side)]
    inputs = [torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(sizes)]

    def forwards(number: int) -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(inputs[number]) for _ in range(4)]

    for mine, alone in zip(together(4, forwards), [forwards(n) for n in range(4)], strict=True):
        assert not isinstance(mine, Exception), mine
        assert all(torch.equal(a, b) for a, b in zip(mine, alone, strict=True))


def test_threads_have_clip_lengths_of_their_own():
    model = make("vit")
    randomise(vpeft.attach(model, "st_adapter", bottleneck=4))
    model.eval()
    rows = images(model, 12)

    def forwards(number: int) -> list[torch.Tensor]:
        with torch.no_grad(), vpeft.clips(model, (1, 2, 3, 6)[number]):
            return [model(rows) for _ in range(4)]

    expected = [forwards(n) for n in range(4)]
    assert not any(torch.equal(expected[0][0], other[0]) for other in expected[1:])
    for mine, alone in zip(together(4, forwards), expected, strict=True):
        assert not isinstance(mine, Exception), mine
        assert all(torch.equal(a, b) for a, b in zip(mine, alone, strict=True))


@pytest.mark.parametrize(
    ("method", "kind"), [("dtl", "vit"), ("vpt_shallow", "swin"), ("vqt", "vit"), ("mpo", "swin"), ("unipelt", "vit")]
)
def test_threads_train_at_the_same_time(method, kind):
    """Gradients too: each thread differentiates its own loss, with activation checkpointing and without."""
    model = make(kind, dtype=torch.float64)
    handle = attached(model, method)
    randomise(handle, 0.05)
    handle.eval()
    leaves = [p for p in handle.trainable_parameters() if p.requires_grad]
    batches = [images(model, 2, seed=number) for number in range(3)]

    def gradients(number: int) -> tuple:
        return torch.autograd.grad(model(batches[number]).square().sum(), leaves)

    expected = [gradients(n) for n in range(3)]
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        for mine, alone in zip(together(3, gradients), expected, strict=True):
            assert not isinstance(mine, Exception), mine
            assert all(torch.allclose(a, b, atol=1e-12, rtol=1e-10) for a, b in zip(mine, alone, strict=True))


@pytest.mark.parametrize(
    "method",
    [
        "adaptformer",
        "fish",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("dtl", "vpt_shallow", "vqt", "unipelt", "st_adapter", "dora")),
    ],
)
def test_a_compiled_model_gives_each_thread_its_own(method):
    model = make("vit")
    handle = attached(model, method)
    randomise(handle, 0.05)
    handle.eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batches = [images(model, 3, seed=number) for number in range(2)]
    with torch.no_grad():
        expected = [model(x) for x in batches]
        assert all(torch.allclose(compiled(x), y, atol=1e-5, rtol=1e-5) for x, y in zip(batches, expected, strict=True))

    def forwards(number: int) -> list[torch.Tensor]:
        with torch.no_grad():
            return [compiled(batches[number]) for _ in range(3)]

    for mine, alone in zip(together(2, forwards), expected, strict=True):
        assert not isinstance(mine, Exception), mine
        assert all(torch.allclose(a, alone, atol=1e-5, rtol=1e-5) for a in mine)


def test_a_copy_is_made_while_another_thread_runs():
    model = make("vit")
    randomise(attached(model, "dtl"))
    model.eval()
    x = images(model)
    with torch.no_grad():
        expected = model(x)

    def work(number: int) -> torch.Tensor:
        with torch.no_grad():
            return [model(x) for _ in range(8)][-1] if number else copy.deepcopy(model)(x)

    for result in together(3, work):
        assert not isinstance(result, Exception), result
        assert torch.equal(result, expected)
