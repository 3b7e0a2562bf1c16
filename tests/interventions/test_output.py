"""Maps of a module's output or input."""

import pytest
import torch
from torch import Tensor, nn

from tests.support.hubs import chain, close, failing, hub_on, put, small, surface
from tests.support.models import images
from vpeft.backbone.modules import LAST, ModuleRef
from vpeft.backbone.sites import Sites
from vpeft.interventions.output import ForPooling, MapOutput

X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Scale(MapOutput):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, y: Tensor) -> Tensor:
        return torch.tanh(y * self.weight)


def linear(fc: nn.Linear, x: Tensor) -> Tensor:
    return x @ fc.weight.T + fc.bias


@pytest.mark.parametrize("on_input", [False, True])
def test_the_map_stands_behind_or_before_the_module(on_input):
    model = chain()
    hub, fc = hub_on(model), model.blocks[0].fc
    before = surface(model)
    part = put(hub, Scale(ModuleRef("blocks.0.fc", fc), 0, on_input=on_input))
    expected = linear(fc, part(X)) if on_input else part(linear(fc, X))
    out = fc(X)
    assert close(out, expected)
    assert close(*(torch.autograd.grad(y.sum(), part.weight)[0] for y in (out, expected)))
    assert [p.module for p in part.hooked()] == [fc]
    hub.acting = ()
    assert close(fc(X), linear(fc, X))
    hub.remove("a")
    assert surface(model) == before


@pytest.mark.parametrize("on_input", [False, True])
def test_two_maps_follow_each_other(on_input):
    model = chain()
    hub, fc = hub_on(model), model.blocks[0].fc
    a, b = (put(hub, Scale(ModuleRef("blocks.0.fc", fc), 0, on_input=on_input), owner) for owner in "ab")
    assert close(fc(X), linear(fc, b(a(X))) if on_input else b(a(linear(fc, X))))
    with failing(fc):
        fc(X)
    assert close(fc(X), linear(fc, b(a(X))) if on_input else b(a(linear(fc, X))))


def test_a_mapped_input_keeps_what_is_given_beside_it():
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
            return scale * (x + 10 * y)

    model = chain()
    model.blocks[0].fc = two = Two()
    part = put(hub_on(model), Scale(ModuleRef("blocks.0.fc", two), 0, on_input=True))
    assert close(two(X, X + 1, scale=2.0), 2 * (part(X) + 10 * (X + 1)))


class Pooling(ForPooling):
    skipped = 0

    def forward(self, y: Tensor) -> Tensor:
        return 2 * y + 1

    def skip(self) -> None:
        self.skipped += 1


@pytest.mark.parametrize("on_input", [False, True])
def test_what_only_pooling_needs_is_left_out_where_maps_are_read(on_input):
    model = small()
    x, norm = images(model), Sites(model).final_norm
    plain = []
    with torch.no_grad():
        watch = norm.module.register_forward_hook(lambda m, args, y: plain.extend([args[0], y]))
        right = model.forward_features(x)
        watch.remove()
    hub = hub_on(model)
    part = put(hub, Pooling(norm, LAST, on_input=on_input))
    changed = type(norm.module).forward(norm.module, 2 * plain[0] + 1) if on_input else 2 * plain[1] + 1
    assert close(model.forward_features(x), changed)
    assert part.skipped == 0
    with hub.saying(maps=True):
        assert torch.equal(model.forward_features(x), right)
    assert part.skipped == 1, "it was told, to take what was kept for it"
    with hub.saying(maps=False):
        assert close(model.forward_features(x), changed)
    assert part.skipped == 1
