"""A method on the timm model inside transformers' TimmWrapperModel and TimmWrapperForImageClassification."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperModel, pipeline
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

import vpeft
from tests.support.models import SMALL, attached, images, randomise, scatter
from vpeft.methods import METHODS

MAIN = {"lora", "bitfit", "vpt_deep", "lst", "vqt"}
methods = pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m in MAIN else pytest.mark.slow) for m in sorted(METHODS)]
)
SIZES = {k: v for k, v in SMALL.items() if k != "num_classes"}


def wrapper(kind=TimmWrapperForImageClassification, seed: int = 0):
    torch.manual_seed(seed)
    made = kind(TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=SIZES, num_labels=5))
    scatter(made.named_parameters())
    return made.eval()


def run(model, x, **options):
    with torch.no_grad():
        return model(x, **options)


@pytest.mark.parametrize("kind", [TimmWrapperForImageClassification, TimmWrapperModel])
def test_the_wrapper_is_refused_and_says_where_the_model_is(kind, tmp_path):
    model = wrapper(kind)
    for call in (lambda: vpeft.attach(model, "lora"), lambda: vpeft.load(model, "x"), lambda: vpeft.get_handle(model)):
        with pytest.raises(
            vpeft.UnsupportedModelError, match=rf"this {kind.__name__} is a wrapper.*give model\.timm_model to"
        ):
            call()


@methods
def test_logits_files_and_states(method, tmp_path):
    """The wrapper's outputs are the timm model's; the adapter's file fits another wrapper, and so does a Trainer's state."""
    model, fresh, other = wrapper(), wrapper(), wrapper()
    x = images(model.timm_model)
    handle = attached(model.timm_model, method)
    randomise(handle)
    model.eval()
    expected = run(model.timm_model, x)
    assert torch.equal(run(model, x).logits, expected)
    hidden = run(model, x, output_hidden_states=True)
    assert torch.allclose(hidden.logits, expected, atol=1e-5)

    handle.save(tmp_path / "adapter.safetensors")
    vpeft.load(fresh.timm_model, tmp_path / "adapter.safetensors")
    assert torch.equal(run(fresh.eval(), x).logits, expected)

    model.save_pretrained(tmp_path / "whole")  # as Trainer's checkpoints are
    if handle.method.needs_calibration:
        return  # the state's sizes may depend on data: docs/models.md
    attached(other.timm_model, method)
    found = other.load_state_dict(load_file(tmp_path / "whole" / "model.safetensors"), strict=False)
    assert not found.missing_keys
    assert not found.unexpected_keys
    assert torch.equal(run(other.eval(), x).logits, expected)


@pytest.mark.parametrize("method", ["lora", "lst", "vpt_deep", "ssf"])
def test_features_of_the_model_without_a_classifier(method):
    model = wrapper(TimmWrapperModel)
    x = images(model.timm_model)
    handle = attached(model.timm_model, method)
    randomise(handle)
    model.eval()
    out = run(model, x)
    assert torch.allclose(out.last_hidden_state, run(model.timm_model.forward_features, x), atol=1e-6)
    assert torch.allclose(out.pooler_output, run(model.timm_model, x), atol=1e-6)
    states = run(model, x, output_hidden_states=True)
    assert torch.allclose(states.last_hidden_state, out.last_hidden_state, atol=1e-6)
    with handle.disable():
        assert not torch.allclose(run(model, x).last_hidden_state, out.last_hidden_state, atol=1e-3)


def test_a_checkpoint_of_the_wrapper_is_not_read_into_a_bare_one_in_silence(tmp_path):
    """``from_pretrained`` knows no methods: transformers names what it left out. Merged, nothing is left out."""
    model = wrapper()
    x = images(model.timm_model)
    handle = attached(model.timm_model, "lora")
    randomise(handle)
    expected = run(model.eval(), x).logits
    model.save_pretrained(tmp_path / "attached")
    again, told = TimmWrapperForImageClassification.from_pretrained(tmp_path / "attached", output_loading_info=True)
    left = {n for n in told["unexpected_keys"] if "lora" in n}
    assert len(left) == len(handle.state_dict())
    assert not torch.allclose(run(again.eval(), x).logits, expected, atol=1e-3)

    handle.merge()
    handle.detach(keep_merged=True)
    model.save_pretrained(tmp_path / "merged")
    again, told = TimmWrapperForImageClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not told["unexpected_keys"]
    assert not told["missing_keys"]
    assert torch.allclose(run(again.eval(), x).logits, expected, atol=1e-5)


@methods
def test_gradient_checkpointing_by_the_wrappers_flag(method):
    model = wrapper()
    x, labels = images(model.timm_model, batch=3), torch.tensor([0, 1, 2])
    handle = attached(model.timm_model, method)
    randomise(handle)
    model.eval()

    def gradients():
        model.zero_grad()
        torch.manual_seed(3)
        model(x, labels=labels).loss.backward()
        return {n: p.grad.clone() for n, p in handle.named_parameters() if p.grad is not None}

    without = gradients()
    model.gradient_checkpointing_enable()
    assert model.timm_model.grad_checkpointing
    with_ = gradients()
    assert without.keys() == with_.keys()
    assert all(torch.allclose(g, with_[n], atol=1e-5, rtol=1e-4) for n, g in without.items())


def test_pipeline_and_copies():
    model = wrapper()
    handle = attached(model.timm_model, "adaptformer")
    randomise(handle)
    model.eval()
    processor = TimmWrapperImageProcessor(
        model.timm_model.pretrained_cfg | {"input_size": (3, 32, 32)}, architecture="vit_tiny_patch16_224"
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    answer = pipeline("image-classification", model=model, image_processor=processor, device="cpu")(image, top_k=5)
    x = processor(image)["pixel_values"]
    wanted = run(model, x).logits.softmax(-1)[0]
    assert [a["score"] for a in answer] == pytest.approx(wanted.sort(descending=True).values.tolist(), abs=1e-5)
    twin = copy.deepcopy(model)
    randomise(vpeft.get_handle(twin.timm_model), seed=5)
    assert torch.equal(run(model, x).logits.softmax(-1)[0], wanted)
    assert not torch.allclose(run(twin, x).logits.softmax(-1)[0], wanted, atol=1e-3)
