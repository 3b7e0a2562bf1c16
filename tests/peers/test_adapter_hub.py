"""Adapters, prefixes and their hybrids beside adapter-hub's, on a transformers ViT with the timm model's tensors."""

import re
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import vpeft
from tests.peers.vits import in_transformers
from tests.support.models import images
from tests.support.peers import HEAD, Same, agree, close, randomise, small_vit, trained

pytestmark = pytest.mark.slow

WIDTH, HEADS, DEPTH = 32, 2, 3
BOTTLENECK, TOKENS, RANK, HIDDEN = 8, 5, 3, 7
REDUCED = {"reduction_factor": WIDTH // BOTTLENECK}

ADAPTER = {
    "down.weight": "adapter_down.0.weight",
    "down.bias": "adapter_down.0.bias",
    "up.weight": "adapter_up.weight",
    "up.bias": "adapter_up.bias",
    "scaling": "scaling",
    "scale": "scaling",
}
NORMED = ADAPTER | {
    "norm.weight": "adapter_norm_before.weight",
    "norm.bias": "adapter_norm_before.bias",
    "down.weight": "adapter_down.1.weight",
    "down.bias": "adapter_down.1.bias",
}
LORA = {"a": "lora_A", "b": "lora_B", "m": "m.weight"}
KRONECKER = {
    f"{ours}.{short}": f"{theirs}.{long}"
    for ours, theirs in (("down", "adapter_down.0"), ("up", "adapter_up"))
    for short, long in (("left", "W_left"), ("right", "W_right"), ("bias", "b"))
}


@pytest.fixture
def model():
    return small_vit()


def peer_of(transformers: ModuleType, adapters: ModuleType, model: nn.Module, config: object) -> nn.Module:
    """The same ViT with one of adapter-hub's methods, all of its tensors random; it trains these and the classifier."""
    theirs = in_transformers(transformers, model)
    close(theirs(images(model)).logits, model(images(model)), "logits of the bare models", atol=1e-12)
    adapters.init(theirs)
    theirs.add_adapter("it", config=config)
    theirs.train_adapter("it")
    theirs = theirs.double().eval()
    randomise(trained(theirs))
    return theirs


def pairs(handle: vpeft.Handle, theirs: nn.Module, parts: dict[str, str] = ADAPTER) -> list[Same]:
    """Our tensors beside theirs, by name."""
    found = [_pair(name, theirs, parts) for name, _ in handle.named_parameters()]
    return [*found, *(Same(n, theirs.classifier.get_parameter(n.removeprefix("head."))) for n in HEAD)]


# Our names as patterns; theirs below ``vit``, with the pattern's groups. PART is looked up in ``parts``.
COUNTERPARTS = {
    r"phm\.rule": "shared_parameters.it.phm_rule",
    r"blocks\.(\d+)\.(?:adapter_mlp|adaptformer)\.(?P<part>.+)": r"encoder.layer.\1.output.output_adapters.adapters.it.PART",
    r"blocks\.(\d+)\.adapter_attn\.(?P<part>.+)": r"encoder.layer.\1.attention_adapters.adapters.it.PART",
    r"blocks\.\d+\.prefix\.(?:key|value)": "prefix_tuning.prefix_tunings.it.self_prefix.control_trans",
    r"prefix\.embedding": "prefix_tuning.prefix_tunings.it.self_prefix.wte.weight",
    r"prefix\.down\.(.+)": r"prefix_tuning.prefix_tunings.it.self_prefix.control_trans.0.\1",
    r"blocks\.\d+\.prefix\.up\.(.+)": r"prefix_tuning.prefix_tunings.it.self_prefix.control_trans.2.\1",
    r"blocks\.(\d+)\.attn\.qkv\.lora\.q\.(?P<part>.+)": r"encoder.layer.\1.attention.attention.query.loras.it.PART",
    r"blocks\.(\d+)\.attn\.qkv\.lora\.k\.(?P<part>.+)": r"encoder.layer.\1.attention.attention.key.loras.it.PART",
    r"blocks\.(\d+)\.attn\.qkv\.lora\.v\.(?P<part>.+)": r"encoder.layer.\1.attention.attention.value.loras.it.PART",
    r"blocks\.(\d+)\.mlp\.fc1\.lora\.(?P<part>.+)": r"encoder.layer.\1.intermediate.dense.loras.it.PART",
    r"blocks\.(\d+)\.mlp\.fc2\.lora\.(?P<part>.+)": r"encoder.layer.\1.output.dense.loras.it.PART",
    r"blocks\.(\d+)\.unipelt\.gate_prefix\.(.+)": r"encoder.layer.\1.attention.attention.prefix_tuning.prefix_gates.it.\2",
    r"blocks\.(\d+)\.unipelt\.gate_lora_q\.(.+)": r"encoder.layer.\1.attention.attention.query.loras.it.gate.\2",
    r"blocks\.(\d+)\.unipelt\.gate_lora_v\.(.+)": r"encoder.layer.\1.attention.attention.value.loras.it.gate.\2",
    r"blocks\.(\d+)\.unipelt\.gate_adapter\.(.+)": r"encoder.layer.\1.output.output_adapters.adapters.it.gate.\2",
}


def _pair(name: str, theirs: nn.Module, parts: dict[str, str]) -> Same:
    matches = [(m, other) for pattern, other in COUNTERPARTS.items() if (m := re.fullmatch(pattern, name))]
    assert len(matches) == 1, f"{name} has {len(matches)} counterparts"
    match, other = matches[0]
    path = match.expand(other).replace("PART", parts.get(match.groupdict().get("part"), "no such part"))
    return Same(name, theirs.vit.get_parameter(path), view_of(name))


def view_of(name: str) -> Callable[[Tensor], Tensor]:
    """How our tensor is read from theirs, which holds the prefixes of all blocks."""
    block = re.match(r"blocks\.(\d+)\.prefix\.(key|value|up)", name)
    if block is None:
        return (lambda t: t[:, 0]) if name.endswith(".m") else (lambda t: t)
    index, kind = int(block[1]), block[2]
    if kind == "up":  # rows of the last linear
        return lambda t: t.chunk(DEPTH)[index]
    place = 2 * index + (kind == "value")
    return lambda t: t.view(TOKENS, 2 * DEPTH, HEADS, WIDTH // HEADS)[:, place].transpose(0, 1)


def check(theirs: nn.Module, handle: vpeft.Handle, parts: dict[str, str] = ADAPTER) -> None:
    agree(handle, theirs, pairs(handle, theirs, parts), images(handle.model), lambda x: theirs(x).logits)


def attached(model: nn.Module, method: str, **options: object) -> vpeft.Handle:
    return vpeft.attach(model, method, **options).eval()


@pytest.mark.parametrize(("act", "theirs"), [("silu", "swish"), ("gelu", "gelu"), ("relu", "relu")])
def test_houlsby(transformers, adapters, model, act, theirs):
    other = peer_of(transformers, adapters, model, adapters.DoubleSeqBnConfig(non_linearity=theirs, **REDUCED))
    check(other, attached(model, "houlsby", bottleneck=BOTTLENECK, act=act))


@pytest.mark.parametrize(
    ("ours", "theirs"), [({}, {}), ({"scale": "learned"}, {"scaling": "learned"}), ({"scale": 0.3}, {"scaling": 0.3})]
)
def test_pfeiffer(transformers, adapters, model, ours, theirs):
    """Theirs reads the whole stream and has neither norm nor gelu."""
    other = peer_of(transformers, adapters, model, adapters.SeqBnConfig(**REDUCED, **theirs))
    check(other, attached(model, "pfeiffer", bottleneck=BOTTLENECK, act="relu", norm=False, **ours))


def test_pfeiffer_preset(transformers, adapters, model):
    other = peer_of(transformers, adapters, model, adapters.SeqBnConfig(**REDUCED))
    check(other, attached(model, "pfeiffer", preset="adapter_hub", bottleneck=BOTTLENECK))


@pytest.mark.parametrize(("method", "config"), [("pfeiffer", "SeqBnConfig"), ("houlsby", "DoubleSeqBnConfig")])
def test_norm_of_its_own(transformers, adapters, method, config):
    """Theirs has torch's eps of 1e-5, ours the backbone's: equal where that is 1e-5 too."""
    model = small_vit(eps=1e-5)
    other = peer_of(
        transformers, adapters, model, getattr(adapters, config)(ln_before=True, non_linearity="relu", **REDUCED)
    )
    check(other, attached(model, method, bottleneck=BOTTLENECK, act="relu", norm=True), NORMED)


@pytest.mark.parametrize("scale", [4.0, 0.3])
def test_parallel(transformers, adapters, model, scale):
    other = peer_of(transformers, adapters, model, adapters.ParBnConfig(scaling=scale, **REDUCED))
    check(other, attached(model, "adapter", variant="parallel", bottleneck=BOTTLENECK, act="relu", scale=scale))


@pytest.mark.parametrize("scale", [4.0, 0.3])
def test_parallel_is_adaptformer(transformers, adapters, model, scale):
    other = peer_of(transformers, adapters, model, adapters.ParBnConfig(scaling=scale, **REDUCED))
    check(other, attached(model, "adaptformer", bottleneck=BOTTLENECK, scale=scale, norm="none"))


@pytest.mark.parametrize("training", [False, True])
def test_adapter_plus(transformers, adapters, model, training):
    """In training mode the same samples' adapters are dropped, at a rate at which it happens."""
    other = peer_of(transformers, adapters, model, adapters.AdapterPlusConfig(stochastic_depth=0.4, **REDUCED))
    handle = attached(model, "adapter_plus", bottleneck=BOTTLENECK, drop_path=0.4).train(training)
    # Only theirs that are the method's: their backbone has no dropout, but its mode is left as it is.
    for name, module in other.named_modules():
        if name.endswith("output_adapters"):
            module.train(training)
    same = pairs(handle, other)
    x = images(model, batch=6)
    agree(handle, other, same, x, lambda x: other(x).logits, before=lambda: torch.manual_seed(3))


@pytest.mark.parametrize(("act", "theirs"), [("gelu", "gelu"), ("gelu_tanh", "gelu_new")])
@pytest.mark.parametrize("rank", [1, 2])
def test_compacter(transformers, adapters, model, rank, act, theirs):
    options = {"non_linearity": theirs, "phm_rank": rank, "phm_dim": 4} | REDUCED
    other = peer_of(transformers, adapters, model, adapters.CompacterConfig(**options))
    check(other, attached(model, "compacter", bottleneck=BOTTLENECK, act=act, n=4, rank=rank), KRONECKER)


@pytest.mark.parametrize("rank", [1, 2])
def test_compacter_plus_plus(transformers, adapters, model, rank):
    """Theirs is at Pfeiffer's place and reads the whole stream; ours, as released, reads the MLP branch by default."""
    options = {"phm_rank": rank, "phm_dim": 4} | REDUCED
    other = peer_of(transformers, adapters, model, adapters.CompacterPlusPlusConfig(**options))
    options = {"bottleneck": BOTTLENECK, "act": "gelu", "n": 4, "rank": rank}
    handle = attached(model, "compacter_plus_plus", variant="post", **options)
    check(other, handle, KRONECKER)
    state = handle.state_dict() | handle.head_state_dict()
    handle.detach()
    published = attached(model, "compacter_plus_plus", **options)
    published.load_state_dict(state)
    assert (model(images(model)) - other(images(model)).logits).abs().max() > 1e-3


def prefix_config(adapters: ModuleType, form: str) -> object:
    return adapters.PrefixTuningConfig(flat=form == "direct", prefix_length=TOKENS, bottleneck_size=HIDDEN)


PREFIX = {"tokens": TOKENS, "hidden": HIDDEN, "shared": True}
forms = pytest.mark.parametrize("form", ["direct", "perceptron"])


@forms
def test_prefix(transformers, adapters, model, form):
    """The perceptron of both has one embedding and one first linear for all blocks."""
    other = peer_of(transformers, adapters, model, prefix_config(adapters, form))
    check(other, attached(model, "prefix", form=form, **PREFIX))


def test_prefix_folded(transformers, adapters, model):
    """What a file holds of the perceptron's form is what their ``eject`` leaves."""
    other = peer_of(transformers, adapters, model, prefix_config(adapters, "perceptron"))
    handle = attached(model, "prefix", form="perceptron", **PREFIX)
    check(other, handle)
    before = model(images(model))
    _, folded = handle.method.exported(handle.root)
    head = handle.head_state_dict()
    handle.detach()
    direct = attached(model, "prefix", tokens=TOKENS)
    other.eject_prefix_tuning("it")
    assert folded.keys() == direct.state_dict().keys()
    for name in folded:
        same = _pair(name, other, {})
        close(folded[name], same.view(same.theirs.detach()), name)
    direct.load_state_dict(folded | head)
    close(model(images(model)), before, "logits after folding")


@forms
def test_mam(transformers, adapters, model, form):
    config = adapters.MAMConfig(prefix_config(adapters, form), adapters.ParBnConfig(**REDUCED))
    other = peer_of(transformers, adapters, model, config)
    options = {"form": form, "bottleneck": BOTTLENECK, "scale": 4.0, "reads": "stream"} | PREFIX
    check(other, attached(model, "mam", **options))


@forms
def test_unipelt(transformers, adapters, model, form):
    """Adapter and gate read the whole stream after the MLP; the other gates what norm1 gives."""
    parts = [prefix_config(adapters, form), adapters.SeqBnConfig(**REDUCED), adapters.LoRAConfig(r=RANK, alpha=2)]
    other = peer_of(transformers, adapters, model, adapters.UniPELTConfig(*parts))
    options = {"form": form, "bottleneck": BOTTLENECK, "rank": RANK, "place": "post"} | PREFIX
    check(other, attached(model, "unipelt", **options), ADAPTER | LORA)


@pytest.mark.parametrize("matrices", ["qv", "k", "qkv"])
def test_lora_in_a_fused_linear(transformers, adapters, model, matrices):
    """Their linears of query, key and value are rows of timm's one."""
    config = adapters.LoRAConfig(r=RANK, alpha=5, attn_matrices=list(matrices), intermediate_lora=True, output_lora=True)
    other = peer_of(transformers, adapters, model, config)
    check(other, attached(model, "lora", rank=RANK, alpha=5.0, targets=[*matrices, "fc1", "fc2"]), LORA)
