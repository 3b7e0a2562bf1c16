"""Loading does no work whose result gives way to the file's."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

import vpeft
from tests.support.models import attached, images, make, randomise


class Watched(TorchFunctionMode):
    """Counts decompositions of tensors with values."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.linalg.svd, torch.linalg.qr) and not args[0].is_meta
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["mpo", "pissa"])
def test_weights_are_not_decomposed_for_values_that_the_file_has(method, tmp_path):
    model = make("vit")
    with Watched() as attaching:
        handle = attached(model, method)
    assert attaching.count > 0
    randomise(handle)
    handle.save(tmp_path / "a.safetensors")
    fresh = make("vit")
    with Watched() as loading:
        again = vpeft.load(fresh, tmp_path / "a.safetensors")
    assert loading.count == 0
    x = images(model)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), model.eval()(x))
    again.merge()
    again.unmerge()
    again.detach()
    with Watched() as after:
        vpeft.attach(fresh, method)
    assert after.count == attaching.count, "attaching decomposes as ever"
