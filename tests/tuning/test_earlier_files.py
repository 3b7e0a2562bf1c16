"""Adapters that earlier versions saved load, and give the logits that they gave then."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import vpeft
from vpeft import checkpoint

SAVED = Path(__file__).parent / "saved_by_0_1_0"
FILES = sorted(f.stem for f in SAVED.glob("*.safetensors") if not f.stem.endswith("_logits"))


def test_there_are_files():
    assert FILES == ["lora", "norm", "vqt"]


@pytest.mark.parametrize("name", FILES)
def test_an_adapter_of_version_0_1_0(name, tmp_path):
    """Each was trained away from its start on an embedded backbone; ``_logits`` holds what images of seed 2 gave."""
    file = SAVED / f"{name}.safetensors"
    metadata = checkpoint.read(file).metadata
    model = timm.create_model(f"{metadata['model']['name']}", pretrained=True, num_classes=7).eval()
    images = torch.randn(2, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        bare = model(images)
        handle = vpeft.load(model, file)
        logits = model(images)
    assert torch.allclose(logits, load_file(SAVED / f"{name}_logits.safetensors")["logits"], atol=1e-5)
    assert metadata["class_names"] == list("abcd")
    assert metadata["metrics"] == {"top1": 50.0}
    again = checkpoint.read(handle.save(tmp_path / "again.safetensors"))
    before = checkpoint.read(file)
    assert again.tensors.keys() == before.tensors.keys()
    assert all(torch.equal(t, before.tensors[n]) for n, t in again.tensors.items())
    handle.detach()
    with torch.no_grad():
        assert torch.equal(model(images), bare)
