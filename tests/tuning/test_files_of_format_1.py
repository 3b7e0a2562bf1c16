"""Files of format 1 load with the meaning that their options had then, and give the logits that they gave.

Each ``NAME.safetensors`` holds random values on an embedded backbone with four classes; ``NAME_logits.safetensors`` holds
what images of seed 2 gave in the version that wrote it. A file put into the folder is tested.
"""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import vpeft
from vpeft import checkpoint
from vpeft.methods.earlier import MEANT

SAVED = Path(__file__).parent / "saved_by_format_1"
FILES = sorted(f.stem for f in SAVED.glob("*.safetensors") if not f.stem.endswith("_logits"))


def backbone(file: Path) -> torch.nn.Module:
    return timm.create_model(checkpoint.read(file).metadata["model"]["name"], pretrained=True, num_classes=7).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.randn(2, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(2)))


def test_every_method_whose_options_grew_has_a_file():
    held = {checkpoint.read(SAVED / f"{name}.safetensors").metadata["method"]["name"] for name in FILES}
    assert not MEANT[1].keys() - held


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_format_1(name, tmp_path):
    """It gives the same logits now, and again after it was saved in today's format."""
    file = SAVED / f"{name}.safetensors"
    before = checkpoint.read(file)
    assert before.metadata["format"] == 1
    model = backbone(file)
    handle = vpeft.load(model, file)
    expected = load_file(SAVED / f"{name}_logits.safetensors")["logits"]
    assert torch.allclose(logits(model), expected, atol=1e-5)

    written = before.metadata["method"]["options"]
    options = handle.method.options()
    assert {n: options[n] for n in written} == written, "what the file says is kept"
    meant = MEANT[1].get(handle.method.name, {})
    assert {n: options[n] for n in meant} == meant, "what it could not say is what it meant"

    again = handle.save(tmp_path / "again.safetensors", training=True)
    now = checkpoint.read(again)
    assert now.metadata["format"] == checkpoint.FORMAT
    assert now.metadata["method"]["options"] == options
    assert now.tensors.keys() == before.tensors.keys()
    assert all(torch.equal(t, before.tensors[n]) for n, t in now.tensors.items())
    other = backbone(file)
    vpeft.load(other, again)
    assert torch.equal(logits(other), logits(model))


def test_adamix_goes_on_with_the_loss_that_it_had():
    """Both directions whole, with a gradient to both sides, times the 100 that the file holds."""
    file = SAVED / "adamix.safetensors"
    handle = vpeft.load(backbone(file), file)
    runs = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    p, q = runs.softmax(-1)
    expected = 100 * ((p - q) * (p / q).log()).sum(1).mean()
    loss = handle.consistency_loss(*runs)
    assert torch.allclose(loss, expected, rtol=1e-10)
    assert torch.allclose(torch.autograd.grad(loss, runs)[0], torch.autograd.grad(expected, runs)[0], atol=1e-10)


def test_a_method_of_ones_own_gets_an_option(tmp_path):
    """A file from before is refused, unless the method says what it meant."""
    from dataclasses import make_dataclass

    from vpeft.methods.base import METHODS, Paper, register
    from vpeft.methods.lora import LoRA

    before = type("Own", (LoRA,), {"__doc__": "One's own.", "__annotations__": {}})
    register("own_lora", Paper("none", "nowhere", "", "additive"), where="linears")(before)
    try:
        handle = vpeft.attach(backbone(SAVED / "mam.safetensors"), "own_lora", rank=2)
        file = handle.save(tmp_path / "a.safetensors")
        del METHODS["own_lora"]
        fields = [("extra", int, 3)]
        after = make_dataclass("Own", fields, bases=(LoRA,), namespace={"__doc__": "One's own."})
        register("own_lora", Paper("none", "nowhere", "", "additive"), where="linears")(after)
        with pytest.raises(vpeft.CheckpointError, match="its metadata lack extra of own_lora"):
            vpeft.load(backbone(SAVED / "mam.safetensors"), file)
        after.unsaid = {"extra": 1}
        assert vpeft.load(backbone(SAVED / "mam.safetensors"), file).method.extra == 1
    finally:
        del METHODS["own_lora"]
