"""Each numeric option at its lowest and its highest value: training stays finite in float32, or attach refuses it."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

import vpeft
from tests.support.models import calibrated, images, make
from vpeft.methods import METHODS, on_images
from vpeft.methods.base import create
from vpeft.options import LARGEST, declared, readable

LABELS = torch.tensor([0, 1, 2, 3])


def ends(option) -> tuple[float, float]:
    low = math.nextafter(option.gt, math.inf) if option.gt is not None else -LARGEST if option.ge is None else option.ge
    high = math.nextafter(option.lt, -math.inf) if option.lt is not None else LARGEST if option.le is None else option.le
    return float(low), float(high)


NUMBERS = [(name, d) for name, cls in METHODS.items() for d in declared(cls) if "float" in readable(d.hint)]
CASES = [(name, d.name, end, "list" in readable(d.hint)) for name, d in NUMBERS for end in ends(d.option)]
# What a bound of one option alone cannot say: it depends on the model or on the data.
REFUSALS = (
    r"give scale or alpha|must be 0|choose another ratio|less than the \d+ of the head|dense phase is (nan|inf); lower"
)


def loss_of(model, handle, seed: int) -> torch.Tensor:
    x = images(model, 4, seed=seed)
    logits = model(x)
    more = [handle.penalty(), handle.method.step_loss(logits, lambda: model(x)) if handle.method.compares_runs else None]
    return F.cross_entropy(logits, LABELS) + sum(term for term in more if term is not None)


def trained(model, method: str, **options) -> None:
    """Two updates' losses and gradients are finite."""
    handle = calibrated(vpeft.attach(model, method, **(on_images(method) | options)))
    model.train()
    optimizer = torch.optim.AdamW(list(handle.trainable_parameters()), lr=1e-3)
    for step in range(2):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = loss_of(model, handle, step)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in handle.trainable_parameters())
        optimizer.step()
        handle.after_step()
        assert all(p.isfinite().all() for p in handle.trainable_parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("method", "option", "value", "many"), CASES, ids=[f"{m}.{o}={v:g}" for m, o, v, _ in CASES])
def test_the_bounds_themselves_give_finite_losses(method, option, value, many):
    model = make("vit", depth=4 if METHODS[method].paper.category == "selective" else 24)
    refusal = None
    try:
        trained(model, method, **{option: [value] * 3 if many else value})
    except vpeft.VpeftError as error:
        refusal = str(error)
    assert refusal is None or re.search(REFUSALS, refusal)


@pytest.mark.parametrize(
    ("method", "most"),
    [("adapter", 100), ("adapter_plus", 100), ("adamix", 100), ("adaptformer", 100), ("mam", 100), ("sct", 10)],
)
def test_factors_of_what_each_block_adds(method, most):
    """A million of them overflows within 24 blocks."""
    with pytest.raises(
        vpeft.MethodError, match=rf"{method}\.scale: {most + 1} is impossible; it must be .* at most {most}$"
    ):
        create(method, scale=most + 1)
    trained(make("vit", depth=24), method, scale=most)


def test_the_share_of_a_random_gradient_is_a_divisor():
    with pytest.raises(vpeft.MethodError, match=r"child_tuning_f\.p: 5e-324 is impossible; it must be at least 0\.001"):
        create("child_tuning_f", p=5e-324)
    trained(make("vit"), "child_tuning_f", p=1e-3)
