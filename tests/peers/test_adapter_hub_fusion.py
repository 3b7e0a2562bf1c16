"""AdapterFusion beside adapter-hub's, on a transformers ViT with the timm model's tensors and three frozen adapters."""

import re
from types import ModuleType

import pytest
import torch
from torch import nn

import vpeft
from tests.peers.test_adapter_hub import ADAPTER, BOTTLENECK, REDUCED, WIDTH, attached
from tests.peers.vits import in_transformers
from tests.support.models import images
from tests.support.peers import HEAD, Same, agree, close, randomise, small_vit, trained

pytestmark = pytest.mark.slow

NAMES = ["a", "b", "c"]
PLACES = {"mlp": "output.output_adapters", "attn": "attention_adapters"}


@pytest.fixture
def model():
    return small_vit()


def fused_peer(
    transformers: ModuleType, adapters: ModuleType, model: nn.Module, configs: list, fusion: object, key_bias: bool = False
) -> nn.Module:
    """The same ViT with adapters and their fusion, all random; the fusion and the classifier train.

    Args:
        configs: of the adapters.
        fusion: their configuration of it.
        key_bias: whether the bias of their key trains; the softmax cancels it, and ours has none unless scores are dropped.
    """
    theirs = in_transformers(transformers, model)
    adapters.init(theirs)
    for name, config in zip(NAMES, configs, strict=True):
        theirs.add_adapter(name, config=config)
    setup = adapters.composition.Fuse(*NAMES)
    theirs.add_adapter_fusion(setup, fusion)
    theirs.train_adapter_fusion(setup)
    theirs = theirs.double().eval()
    for name, p in theirs.named_parameters():
        if name.startswith("classifier"):
            p.requires_grad_(True)
    frozen = [p for n, p in theirs.named_parameters() if "adapters." in n and "fusion" not in n]
    assert frozen
    randomise(frozen, seed=5)
    randomise(trained(theirs))
    for name, p in theirs.named_parameters():
        if name.endswith("key.bias") and "fusion" in name:
            p.requires_grad_(key_bias)
    return theirs


def counterpart(name: str) -> str:
    """Their name, below ``vit``, of one of our tensors."""
    block, half, rest = re.fullmatch(r"blocks\.(\d+)\.fusion_(attn|mlp)\.(.+)", name).groups()
    if adapter := re.fullmatch(r"adapters\.(\w)\.(.+)", rest):
        return f"encoder.layer.{block}.{PLACES[half]}.adapters.{adapter[1]}.{ADAPTER[adapter[2]]}"
    return f"encoder.layer.{block}.{PLACES[half]}.adapter_fusion_layer.{','.join(NAMES)}.{rest}"


def check(theirs: nn.Module, handle: vpeft.Handle, before=lambda: None, batch: int = 3) -> None:
    own = {n for n, _ in handle.named_parameters()}
    frozen = {n: theirs.vit.get_parameter(counterpart(n)).detach() for n in handle.state_dict().keys() - own}
    handle.load_state_dict(frozen, strict=False)
    same = [Same(n, theirs.vit.get_parameter(counterpart(n))) for n in own]
    same += [Same(n, theirs.classifier.get_parameter(n.removeprefix("head."))) for n in HEAD]
    agree(handle, theirs, same, images(handle.model, batch), lambda x: theirs(x).logits, before)
    assert all(torch.equal(handle.state_dict()[n], t) for n, t in frozen.items())


def options(method: str, *each: dict, **common) -> dict:
    """Our options of three adapters."""
    given = [
        {"method": method, "bottleneck": BOTTLENECK, "act": "relu", "norm": False} | common | e for e in each or [{}] * 3
    ]
    return dict(zip(NAMES, given, strict=True))


@pytest.mark.parametrize(("fusion", "value"), [("dynamic", True), ("static", False)])
def test_pfeiffers_place(transformers, adapters, model, fusion, value):
    configs = [
        adapters.SeqBnConfig(**REDUCED),
        adapters.SeqBnConfig(scaling="learned", non_linearity="swish", **REDUCED),
        adapters.SeqBnConfig(reduction_factor=WIDTH // 4, scaling=0.3),
    ]
    other = fused_peer(transformers, adapters, model, configs, fusion)
    ours = options("pfeiffer", {}, {"scale": "learned", "act": "silu"}, {"bottleneck": 4, "scale": 0.3})
    check(other, attached(model, "adapter_fusion", adapters=ours, value=value))


def test_houlsbys_places(transformers, adapters, model):
    other = fused_peer(transformers, adapters, model, [adapters.DoubleSeqBnConfig(**REDUCED)] * 3, "dynamic")
    check(other, attached(model, "adapter_fusion", adapters=options("houlsby", act="silu")))


@pytest.mark.parametrize("residual", ["after", "before"])
def test_residual_at_the_branch(transformers, adapters, model, residual):
    """Their keys carry the residual too: they are the values' own memory, to which it is added in place."""
    fusion = adapters.DynamicAdapterFusionConfig(residual_before=residual == "before")
    configs = [adapters.SeqBnConfig(original_ln_before=False, **REDUCED)] * 3
    other = fused_peer(transformers, adapters, model, configs, fusion)
    ours = options("adapter", variant="intermediate")
    check(other, attached(model, "adapter_fusion", adapters=ours, residual=residual))


def test_their_residual_before_at_pfeiffers_place(transformers, adapters, model):
    """It is the second branch's output, not what the adapters read: ours has another function there, as its page says."""
    fusion = adapters.DynamicAdapterFusionConfig(residual_before=True)
    other = fused_peer(transformers, adapters, model, [adapters.SeqBnConfig(**REDUCED)] * 3, fusion)
    output, seen = other.vit.encoder.layer[1].output, []
    output.register_forward_hook(lambda module, args, result: seen.append((*args, result)))
    other(images(model))
    hidden, u, result = seen[0]
    m, layer = output.dense(hidden), output.output_adapters
    mixing = layer.adapter_fusion_layer[",".join(NAMES)]
    a = torch.stack([layer.adapters[n].adapter_up(layer.adapters[n].adapter_down(u + m)) + m for n in NAMES], -2)
    shares = (mixing.query(u + m).unsqueeze(-2) * mixing.key(a)).sum(-1, keepdim=True).softmax(-2)
    close(result, u + mixing.value((shares * a).sum(-2)), "output of a block")


def test_drop_path_of_the_adapters_in_training(transformers, adapters, model):
    """The same samples' adapters are dropped, before keys and values are taken of them."""
    config = adapters.AdapterPlusConfig(stochastic_depth=0.4, **REDUCED)
    other = fused_peer(transformers, adapters, model, [config] * 3, "dynamic")
    handle = attached(model, "adapter_fusion", adapters=options("adapter_plus", act="gelu", drop_path=0.4)).train()
    for name, module in other.named_modules():
        if name.endswith("output_adapters"):
            module.train()
    check(other, handle, before=lambda: torch.manual_seed(3), batch=6)


def test_dropout_of_the_scores(transformers, adapters, model):
    fusion = adapters.DynamicAdapterFusionConfig(dropout_prob=0.5)
    other = fused_peer(transformers, adapters, model, [adapters.SeqBnConfig(**REDUCED)] * 3, fusion, key_bias=True)
    handle = attached(model, "adapter_fusion", adapters=options("pfeiffer"), dropout=0.5).train()
    for name, module in other.named_modules():
        if name.endswith("output_adapters"):
            module.train()
    check(other, handle, before=lambda: torch.manual_seed(3))


def test_penalty_start_and_counts(transformers, adapters, model):
    other = fused_peer(transformers, adapters, model, [adapters.SeqBnConfig(**REDUCED)] * 3, "dynamic", key_bias=True)
    again = fused_peer(transformers, adapters, model, [adapters.SeqBnConfig(**REDUCED)] * 3, "dynamic")
    handle = attached(model, "adapter_fusion", adapters=options("pfeiffer"))
    their_count = sum(p.numel() for n, p in other.named_parameters() if "adapter_fusion_layer" in n and p.requires_grad)
    ours = sum(p.numel() for p in handle.parameters())
    assert their_count - ours == 3 * WIDTH  # the keys' biases
    logits = other(images(model)).logits.square().sum()
    logits.backward()
    for name, p in other.named_parameters():
        if name.endswith("key.bias") and "fusion" in name:
            assert p.grad.abs().max() < 1e-12  # which learn nothing
    check(again, handle)
    close(handle.penalty(), again.vit.get_fusion_regularization_loss(), "penalty")
    layer = adapters.methods.modeling.BertFusion(adapters.DynamicAdapterFusionConfig(), WIDTH, 0.0)
    start = vpeft.attach(small_vit(), "adapter_fusion").state_dict()
    assert torch.equal(start["blocks.1.fusion_mlp.value.weight"], layer.value.weight.double())
    assert not layer.query.bias.any()


def test_parallel_adapters_get_the_stream_twice(transformers, adapters, model):
    """What theirs does with these is an error that ours does not repeat: with adapters that add nothing, it is not the bare ViT."""
    other = fused_peer(transformers, adapters, model, [adapters.ParBnConfig(**REDUCED)] * 3, "dynamic")
    bare = in_transformers(transformers, model)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if "adapter_up" in name:
                p.zero_()
        for name in ("weight", "bias"):
            bare.classifier.get_parameter(name).copy_(other.classifier.get_parameter(name))
    x = images(model)
    assert (other(x).logits - bare(x).logits).abs().max() > 1e-2
    handle = attached(model, "adapter_fusion", adapters=options("adapter", variant="parallel", init="lora"))
    own = {n: other.classifier.get_parameter(n.removeprefix("head.")).detach() for n in HEAD}
    handle.load_state_dict(own, strict=False)
    close(model(x), bare(x).logits, "logits")
