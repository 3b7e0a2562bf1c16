"""Methods that train the backbone's own tensors, on a transformers ViT with the timm model's tensors."""

import pytest
import torch

import vpeft
from tests.peers.vits import in_transformers, translated
from tests.support.models import images, randomise
from tests.support.peers import close, small_vit
from vpeft.tasks.video.model import joint_vit, load_videomae

pytestmark = pytest.mark.slow


def gains(theirs, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Multiply both branches of theirs, as published; the gains are returned as tensors that train, by our names."""
    made = {n: v.detach().clone().requires_grad_() for n, v in values.items()}
    for i, layer in enumerate(theirs.vit.encoder.layer if made else ()):
        first, second = made[f"blocks.{i}.difffit.gamma1"], made[f"blocks.{i}.difffit.gamma2"]
        # What they return is added to the stream at once: the attention, and the MLP's second linear.
        layer.attention.register_forward_hook(lambda m, a, out, g=first: out * g)
        layer.output.dense.register_forward_hook(lambda m, a, out, g=second: out * g)
    return made


@pytest.mark.parametrize("method", ["bitfit", "norm", "difffit"])
def test_biases_norms_and_gains(transformers, method):
    """The same tensors train: all that are called ``bias``, or the norms', by their names in either library."""
    model, bare = small_vit(), small_vit()
    handle = vpeft.attach(model, method).eval()
    randomise(handle)
    own = {n: p for n, p in handle.named_parameters() if ".difffit." not in n}
    with torch.no_grad():
        for name, p in [*own.items(), *handle.head_parameters()]:
            bare.get_parameter(name).copy_(p)
    theirs = in_transformers(transformers, bare)
    made = gains(theirs, {n: p for n, p in handle.named_parameters() if ".difffit." in n})
    assert len(made) == (6 if method == "difffit" else 0)

    wanted = {"bitfit": ("bias",), "norm": ("layernorm",), "difffit": ("bias", "layernorm")}[method]
    trained = {n: p for n, p in theirs.vit.named_parameters(prefix="vit") if any(w in n for w in wanted)}
    assert translated(own).keys() == trained.keys()

    x = images(model)
    weights = torch.randn(len(x), model.num_classes, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    ours, expected = model(x), theirs(x).logits
    close(ours, expected, "logits")
    (ours * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, gradient in translated({n: p.grad for n, p in own.items()}).items():
        # That of a key's bias is zero: it moves all scores of a query alike.
        assert gradient.abs().max() > 1e-8 or name.endswith("attention.key.bias"), name
        close(gradient, trained[name].grad, f"gradient of {name}")
    for name, gain in made.items():
        close(dict(handle.named_parameters())[name].grad, gain.grad, f"gradient of {name}")


def test_videomae_of_transformers_is_read(transformers, tmp_path):
    """Logits of a saved VideoMAE classifier, from transformers and from our joint ViT with its file."""
    sizes = {"image_size": 32, "num_frames": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.VideoMAEConfig(**sizes, intermediate_size=128, layer_norm_eps=1e-6, num_labels=5)
    theirs = transformers.VideoMAEForVideoClassification(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    own = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = joint_vit("vit_tiny_patch16_224", frames=4, **own).eval()
    assert load_videomae(model, tmp_path / "model.safetensors") == []
    clip = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        close(model(clip).double(), theirs(clip.transpose(1, 2)).logits.double(), "VideoMAE", 1e-5)
