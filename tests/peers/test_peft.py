"""LoRA and its relatives beside huggingface's peft on the same timm model: logits, gradients and merged weights."""

import copy

import pytest
import timm
import torch

import vpeft
from tests.support.models import images, scatter
from tests.support.peers import HEAD, Same, agree, close, peer, randomise, small_vit, trained

pytestmark = pytest.mark.slow

RANK = 3
# Of peft's target_modules, and of ours.
TARGETS = {
    "qkv": (["qkv"], ["qkv"]),
    "rest": (["attn.proj", "fc1", "fc2"], ["proj", "fc1", "fc2"]),
    "all": (["qkv", "attn.proj", "mlp.fc1", "mlp.fc2"], ["qkv", "proj", "fc1", "fc2"]),
    "separate": (["q_proj", "v_proj", "attn.proj"], ["q", "v", "proj"]),
}
targets = pytest.mark.parametrize("where", list(TARGETS))


def build(where: str) -> torch.nn.Module:
    """A ViT with a fused qkv, or an EVA with a linear each for q, k and v."""
    if where != "separate":
        return small_vit()
    torch.manual_seed(0)
    model = timm.create_model("eva02_base_patch14_224", embed_dim=32, depth=3, num_heads=2, num_classes=5, img_size=28)
    model = model.double().eval()
    scatter(model.named_parameters())
    return model


def wrapped(peft, model: torch.nn.Module, config: str, where: str, **options) -> torch.nn.Module:
    """peft's model around a copy, its own tensors random."""
    options |= {"target_modules": TARGETS[where][0], "modules_to_save": ["head"]}
    made = peft.get_peft_model(copy.deepcopy(model), getattr(peft, config)(**options)).eval()
    randomise(trained(made))
    return made


def pairs(handle: vpeft.Handle, theirs: torch.nn.Module, kind: str, names: dict[str, str]) -> list[Same]:
    """Our ``PATH.KIND.NAME`` beside their ``PATH.<names[NAME]>``, and the two heads."""
    modules, found = dict(theirs.base_model.model.named_modules()), []
    for name, _ in handle.named_parameters():
        path, _, short = name.partition(f".{kind}.")
        short = short.rpartition(".")[2]
        parameter = modules[path].get_parameter(names[short])
        found.append(Same(name, parameter))
    head = modules["head"].modules_to_save["default"]
    return [*found, *(Same(n, head.get_parameter(n.removeprefix("head."))) for n in HEAD)]


def merged_agree(handle: vpeft.Handle, theirs: torch.nn.Module) -> None:
    """The tensors of both after merging; and the merged models give what they gave before."""
    x, bare = images(handle.model), {n: t.clone() for n, t in handle.model.state_dict().items()}
    before = handle.model(x)
    plain = theirs.merge_and_unload()
    handle.merge()
    merged = handle.model.state_dict()
    changed = {n for n, t in merged.items() if n in bare and not torch.equal(t, bare[n])}
    assert changed == {f"{i.site.path}.weight" for i in handle.root.interventions}
    for name, tensor in plain.state_dict().items():
        close(merged[name], tensor, f"merged {name}")
    close(handle.model(x), before, "logits after merging")
    close(plain(x), before, "peft's logits after merging")


LORA = {"a": "lora_A.default.weight", "b": "lora_B.default.weight"}
DORA = LORA | {"m": "lora_magnitude_vector.default.weight"}


@targets
@pytest.mark.parametrize(
    ("method", "options", "theirs", "names"),
    [
        ("lora", {"alpha": 5.0}, {"lora_alpha": 5.0}, LORA),
        ("lora", {"scale": 0.7}, {"lora_alpha": 0.7 * RANK}, LORA),
        ("lora", {"alpha": 5.0, "scaling": "rslora"}, {"lora_alpha": 5.0, "use_rslora": True}, LORA),
        ("rslora", {"alpha": 5.0}, {"lora_alpha": 5.0, "use_rslora": True}, LORA),
        ("dora", {"alpha": 5.0}, {"lora_alpha": 5.0, "use_dora": True}, DORA),
    ],
)
def test_lora_and_dora(peft, where, method, options, theirs, names):
    model = build(where)
    other = wrapped(peft, model, "LoraConfig", where, r=RANK, **theirs)
    handle = vpeft.attach(model, method, rank=RANK, targets=TARGETS[where][1], **options).eval()
    agree(handle, other, pairs(handle, other, "lora", names), images(model), other)
    merged_agree(handle, other)


@pytest.mark.parametrize(("method", "names"), [("lora", LORA), ("dora", DORA)])
def test_dropout_on_the_input(peft, method, names):
    """In training mode, with the same random numbers: one mask for each linear, in the order of the forward."""
    model = build("all")
    options = {"r": RANK, "lora_alpha": 5.0, "lora_dropout": 0.3, "use_dora": method == "dora"}
    other = wrapped(peft, model, "LoraConfig", "all", **options)
    handle = vpeft.attach(model, method, rank=RANK, targets=TARGETS["all"][1], alpha=5.0, dropout=0.3)
    handle.train()
    other.train()
    seed = lambda: torch.manual_seed(3)  # noqa: E731
    agree(handle, other, pairs(handle, other, "lora", names), images(model), other, before=seed)


@targets
def test_lora_fa(peft, where):
    """peft's LoRA-FA is a LoRA whose A its optimiser's constructor freezes."""
    model = build(where)
    other = wrapped(peft, model, "LoraConfig", where, r=RANK, lora_alpha=5.0)
    peer("peft.optimizers").create_lorafa_optimizer(model=other, r=RANK, lora_alpha=5.0, lr=1e-3)
    handle = vpeft.attach(model, "lora_fa", rank=RANK, targets=TARGETS[where][1], alpha=5.0).eval()
    modules = dict(other.base_model.model.named_modules())
    frozen = {
        n: modules[n.removesuffix(".lora.a")].lora_A.default.weight.detach() for n in handle.state_dict() if n.endswith(".a")
    }
    assert frozen
    handle.load_state_dict(frozen, strict=False)
    agree(handle, other, pairs(handle, other, "lora", LORA), images(model), other)
    merged_agree(handle, other)


@targets
@pytest.mark.parametrize("alpha", [float(RANK), 5.0])
def test_pissa(peft, where, alpha):
    """The start in float32, which peft insists on: the same principal part, and W without it as their frozen weight.

    Then exactly, in float64, at random values around their start.
    """
    model = build(where).float()
    options = {"target_modules": TARGETS[where][0], "modules_to_save": ["head"], "init_lora_weights": "pissa"}
    other = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=RANK, lora_alpha=alpha, **options)).eval()
    model, other = model.double(), other.double()
    handle = vpeft.attach(model, "pissa", rank=RANK, targets=TARGETS[where][1], alpha=alpha).eval()
    s, modules = handle.state_dict(), dict(other.base_model.model.named_modules())
    # Slots of a fused linear are not compared here, so that one linear has one pair.
    starts = {n: n.rpartition(".lora.")[0] for n in s if n.endswith(("a0", "b0"))}
    theirs = {n: modules[p].get_parameter(LORA[n[-2]]).detach().clone() for n, p in starts.items()}
    assert len(starts) == 2 * 3 * len(TARGETS[where][1])
    for name, path in starts.items():
        if name.endswith("b0"):
            continue
        a, b, up = s[name], s[f"{name[:-2]}b0"], f"{name[:-2]}b0"
        close(b @ a, theirs[up] @ theirs[name], f"principal part of {path}", atol=1e-5)
        # The factors themselves are the same to the sign of each singular pair.
        close((a @ theirs[name].T).abs(), a @ a.T, f"A of {path}", atol=1e-5)
        weight, frozen = model.get_parameter(f"{path}.weight"), modules[path].base_layer.weight
        close(weight - alpha / RANK * b @ a, frozen, f"frozen weight of {path}", atol=1e-5)
        with torch.no_grad():  # W as their rounded tensors have it
            weight.copy_(frozen + alpha / RANK * theirs[up] @ theirs[name])
    handle.load_state_dict(theirs, strict=False)

    randomise(trained(other))
    agree(handle, other, pairs(handle, other, "lora", LORA), images(model), other)
    merged_agree(handle, other)


KRONA = {"a": "lokr_w1.default", "b": "lokr_w2.default"}


@pytest.mark.parametrize(("where", "factor"), [("qkv", -1), ("qkv", 4), ("rest", 8), ("separate", 4), ("separate", -1)])
def test_krona(peft, where, factor):
    """peft's LoKr with neither factor decomposed (its rank is too large for that); s is its alpha / r."""
    model = build(where)
    rank = 10_000
    other = wrapped(peft, model, "LoKrConfig", where, r=rank, alpha=0.7 * rank, decompose_factor=factor)
    shapes = {tuple(p.shape) for n, p in other.named_parameters() if "lokr_w1" in n}
    assert len(shapes) == 1, "one shape of A is given for all linears"
    handle = vpeft.attach(model, "krona", targets=TARGETS[where][1], scale=0.7, shape=list(shapes.pop())).eval()
    agree(handle, other, pairs(handle, other, "krona", KRONA), images(model), other)
    merged_agree(handle, other)
