"""Files: what is in them, and that a damaged or foreign one is refused with the model untouched."""

import json
import random

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import vpeft
from tests.support.models import images, make, randomise
from vpeft import checkpoint
from vpeft.backbone import embedded


@pytest.fixture
def saved(tmp_path):
    model = make("vit")
    handle = vpeft.attach(model, "lora", rank=2, name="pets")
    randomise(handle)
    path = handle.save(
        tmp_path / "pets.safetensors", class_names=["a", "b", "c", "d", "e"], metrics={"top1": 91.5}, config={"seed": 3}
    )
    return path, model


def untouched(model, tried) -> None:
    before = {n: t.clone() for n, t in model.state_dict().items()}
    flags, head = [p.requires_grad for p in model.parameters()], model.get_classifier()
    tried()
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.get_classifier() is head
    assert not hasattr(model, "vpeft")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def refused(path, match, model=None, **kwargs):
    model = model or make("vit")

    def tried():
        with pytest.raises(vpeft.CheckpointError, match=match):
            vpeft.load(model, path, **kwargs)

    untouched(model, tried)


def test_metadata(saved):
    path, model = saved
    with safe_open(path, "pt") as f:
        about = json.loads(f.metadata()["vpeft"])
        names = set(f.keys())
    assert names == {f"blocks.{i}.attn.qkv.lora.{s}.{x}" for i in range(3) for s in "qv" for x in "ab"} | {
        "head.weight", "head.bias",
    }  # fmt: skip
    assert about["method"] == {"name": "lora", "options": vpeft.LoRA(rank=2).options()}
    assert about["model"]["name"] == "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert about["model"]["img_size"] == [32, 32]
    assert about["fingerprint"] == checkpoint.fingerprint(model, [])
    assert {"mean", "std", "interpolation", "input_size", "crop_pct"} <= about["data"].keys()
    assert about["class_names"] == list("abcde")
    assert (about["num_classes"], about["metrics"], about["config"]) == (5, {"top1": 91.5}, {"seed": 3})
    assert {"vpeft", "torch", "timm"} <= about["versions"].keys()


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_is_found_wherever_it_is(saved, seed):
    path, _ = saved
    blob = bytearray(path.read_bytes())
    place = random.Random(seed).randrange(len(blob))
    blob[place] ^= 1 << (seed % 8)
    path.write_bytes(blob)
    refused(path, "damaged|no safetensors|not one that vpeft wrote")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_truncated_file(saved, share):
    path, _ = saved
    blob = path.read_bytes()
    path.write_bytes(blob[: int(share * len(blob))])
    refused(path, "damaged or no safetensors file")


def test_files_of_other_formats(tmp_path):
    refused(tmp_path / "none.safetensors", "does not exist")
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "damaged or no safetensors file")
    save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors")
    refused(tmp_path / "b.safetensors", "not one that vpeft wrote")


def test_a_file_of_a_later_format(saved, monkeypatch):
    path, model = saved
    monkeypatch.setattr(checkpoint, "FORMAT", 3)
    later = vpeft.get_handle(model).save(path)
    monkeypatch.undo()
    refused(later, "format 3; this version of vpeft reads 1 to 2")


def test_another_backbone(saved):
    path, _ = saved
    refused(path, "other frozen weights", make("vit", seed=1))
    refused(path, "trained on vit_tiny_patch16_224.*, this model is swin_tiny", make("swin"))
    refused(path, "other frozen weights", make("vit", depth=4))
    other = make("vit", seed=1)
    vpeft.load(other, path, check_backbone=False)
    assert vpeft.get_handle(other).name == "pets"


def test_a_method_that_is_not_registered_here(saved, monkeypatch):
    path, _ = saved
    from vpeft.methods import METHODS

    monkeypatch.delitem(METHODS, "lora")
    refused(path, "its method cannot be rebuilt here: unknown method 'lora'")


def test_tensors_that_do_not_fit(saved):
    path, model = saved
    handle = vpeft.get_handle(model)
    # a file whose metadata promises another rank than its tensors have
    handle.method.rank = 3
    handle.save(path)
    refused(path, r"shape \(2, 32\) in the file, \(3, 32\) in the model")


@pytest.mark.parametrize("classes", [0, 5, 1000])
def test_the_head_is_rebuilt(saved, classes):
    path, model = saved
    fresh = make("vit", num_classes=classes)
    # another class count draws other random numbers: give both the same frozen weights
    frozen = {n: t for n, t in model.state_dict().items() if not n.startswith(("vpeft.", "head."))}
    fresh.load_state_dict(frozen, strict=False)
    handle = vpeft.load(fresh, path)
    assert fresh.num_classes == 5
    assert torch.equal(fresh(images(fresh)), model(images(model)))
    assert all(p.requires_grad for p in fresh.get_classifier().parameters())
    assert {n for n, _ in handle.head_parameters()} == {"head.weight", "head.bias"}


def test_without_the_head(saved):
    path, model = saved
    fresh = make("vit")
    head = fresh.head.weight.clone()
    vpeft.load(fresh, path, head=False)
    assert torch.equal(fresh.head.weight, head)
    assert torch.equal(fresh.forward_features(images(fresh)), model.forward_features(images(model)))


def test_a_crash_while_writing_leaves_the_old_file(saved, monkeypatch):
    path, model = saved
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        vpeft.get_handle(model).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_loading_needs_no_network(saved, monkeypatch):
    import socket

    monkeypatch.setattr(socket, "socket", lambda *a, **k: pytest.fail("the network was used"))
    vpeft.load(make("vit"), saved[0])


@pytest.mark.parametrize("name", ["vit_micro_patch4_28.vpeft_fashion", "swin_micro_patch2_window7_28.vpeft_fashion"])
def test_embedded_backbones(name):
    model = timm.create_model(name, pretrained=True).eval()
    cfg = model.pretrained_cfg
    assert (cfg["input_size"], cfg["num_classes"], cfg["interpolation"]) == ((3, 28, 28), 10, "bicubic")
    assert timm.create_model(name, pretrained=True, num_classes=7)(torch.zeros(1, 3, 28, 28)).shape == (1, 7)
    features = timm.create_model(name, pretrained=True, features_only=True)(torch.zeros(1, 3, 28, 28))
    assert all(f.ndim == 4 for f in features)
    # Fashion-MNIST's own classes, which a random network would not know: see tests/backbone/test_embedded.py
    assert embedded.WEIGHTS.joinpath(f"{name.partition('.')[0]}.safetensors").stat().st_size < 6 * 2**20
