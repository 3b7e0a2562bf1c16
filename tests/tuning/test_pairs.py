"""Every pair of methods on one model: they act together, or are refused when the second is enabled, with the place."""

import copy
import functools
import itertools
import re

import pytest
import torch

import vpeft
from tests.support.models import REFUSED, attached, images, make, randomise
from vpeft.methods import METHODS

# Behind these no gradient enters the model: what others train gets none, by the methods' own form. (In a model of random
# weights dam_vp takes one output for all classes, whose logits are then equal.)
CUT = {"lst", "vqt", "dam_vp"}
PLACE = re.compile(r"^(blocks|layers|head)[\w.]*: |has its own values of ")


def gradients(model, handles, x):
    """The output, and of each trained parameter the largest gradient."""
    named = {f"{h.name}:{n}": p for h in handles for n, p in h.named_parameters() if p.requires_grad}
    out = model.eval()(x)
    loss = torch.nn.functional.cross_entropy(out, torch.tensor([0, 1]))
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True) if named else []
    assert torch.isfinite(out).all()
    return {n: 0.0 if g is None else float(g.abs().max()) for n, g in zip(named, found, strict=True)}


@functools.cache
def alone(kind: str, method: str, name: str):
    """A model with the method under a name, and its gradients."""
    model = make(kind)
    handle = attached(model, method, name=name)
    randomise(handle, 0.1, seed=len(name))
    return model, gradients(model, [handle], images(model, 2))


def refusal(enable) -> str | None:
    try:
        enable()
    except vpeft.MethodError as error:
        return str(error)
    return None


def together(kind: str, one: str, two: str) -> str | None:
    """Let both act, one after two's attaching; the reason where they are refused."""
    model = copy.deepcopy(alone(kind, one, "first")[0])
    randomise(attached(model, two, name="second"), 0.1, seed=len("second"))
    first, second = (vpeft.get_handle(model, name) for name in ("first", "second"))
    before = vpeft.active(model), {n: t.clone() for n, t in model.state_dict().items() if "extra" not in n}
    reason = refusal(lambda: vpeft.activate(model, ["first", "second"]))
    if reason is not None:
        assert vpeft.active(model) == before[0]
        assert all(torch.equal(t, model.state_dict()[n]) for n, t in before[1].items())
        second.disable()
        first.enable()
        assert refusal(second.enable) is not None
        assert PLACE.search(reason), reason
        return reason
    found = gradients(model, [first, second], images(model, 2))
    expected = alone(kind, one, "first")[1] | alone(kind, two, "second")[1]
    lost = [n for n, g in found.items() if expected.get(n) and not g]
    assert not lost or {one, two} & CUT, lost
    return None


WORKS = [
    ("vit", "mona", "vpt_shallow"), ("vit", "sct", "vpt_shallow"), ("vit", "vpt_shallow", "dtl"),
    ("vit", "vpt_shallow", "lst"), ("swin", "vpt_shallow", "mona"), ("swin", "sct", "vpt_deep"), ("vit", "sct", "vqt"),
    ("vit", "lora", "evp"), ("vit", "ssf", "bitfit"), ("vit", "prefix", "vpt_deep"), ("swin", "lora", "fact_tt"),
]  # fmt: skip
DO_NOT = [
    ("vit", "convpass", "vqt", "blocks.0: 'second' (vqt) sends rows of its own through the block"),
    ("vit", "mona", "vqt", "blocks.0: 'second' (vqt) sends rows"),
    ("vit", "aim", "unipelt", "blocks.0: 'first' (aim) runs the attention along time"),
    ("swin", "vpt_shallow", "vpt_shallow", "layers.0.blocks.0: 'first' (vpt_shallow) sends tokens of its own"),
    ("vit", "evp", "lora", "head: 'first' (evp) acts at its own classifier, and that of 'second' is in the model"),
    ("swin", "ilm_vp", "bitfit", "head.fc: 'first' (ilm_vp) acts at its own classifier"),
    ("vit", "vqt", "lora", "head: 'first' (vqt) acts at its own classifier"),
    ("vit", "magnitude", "magnitude", "has its own values of"),
    ("vit", "full", "magnitude", "has its own values of"),
    ("vit", "norm", "bitfit", "has its own values of"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "one", "two"), WORKS)
def test_together(kind, one, two):
    assert together(kind, one, two) is None


@pytest.mark.parametrize(("kind", "one", "two", "reason"), DO_NOT)
def test_refused_with_the_place(kind, one, two, reason):
    assert reason in together(kind, one, two)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "swin"])
@pytest.mark.parametrize("one", sorted(METHODS))
def test_every_pair(kind, one):
    methods = [m for m in sorted(METHODS) if (m, kind) not in REFUSED]
    works = [two for two in methods if one in methods and together(kind, one, two) is None]
    assert len(works) > len(methods) / 2 or one in {"dam_vp", "evp", "ilm_vp", "vqt"} or one not in methods


@pytest.mark.parametrize("order", [["mask", "dora"], ["dora", "mask"]])
def test_dora_beside_a_mask_has_the_length_of_the_masked_rows(order):
    """m (W' + s B A) / |W' + s B A| with W' the weight with the chosen entries in it, and their bias."""
    model = make("vit", dtype=torch.float64)
    randomise(attached(model, "magnitude", name="mask", ratio=0.3))
    randomise(attached(model, "dora", name="dora", targets=["fc1"]))
    linear, x = model.blocks[1].mlp.fc1, torch.randn(5, 32, dtype=torch.float64)
    mask, dora = (vpeft.get_handle(model, name).root for name in ("mask", "dora"))
    weight, bias = (mask.get_submodule(f"blocks.1.mlp.fc1.{n}")(getattr(linear, n)) for n in ("weight", "bias"))
    part = dora.get_submodule("blocks.1.mlp.fc1.lora")
    changed = weight + part.product()
    expected = x @ (part.m[:, None] * changed / changed.norm(dim=1, keepdim=True)).T + bias
    vpeft.activate(model, order)
    assert (linear(x) - expected).abs().max() <= 1e-10


LINEAR = ["lora", "rslora", "pissa", "krona", "fact_tt", "kadaptation", "increlora"]


@pytest.mark.parametrize(
    ("one", "two"),
    [
        pytest.param(*pair, marks=() if pair in (("lora", "krona"), ("pissa", "fact_tt")) else pytest.mark.slow)
        for pair in itertools.combinations(LINEAR, 2)
    ],
)
def test_what_is_added_to_linears_adds_up(one, two):
    """The stack is the bare model with both changes of its weights."""
    model = make("vit", dtype=torch.float64)
    changed = []
    for seed, method in enumerate((one, two)):
        handle = attached(model, method, name=f"h{seed}")
        randomise(handle, seed=seed)
        handle.merge()
        changed.append({n: p.detach().clone() for n, p in model.named_parameters() if "vpeft" not in n})
        handle.unmerge()
    bare = make("vit", dtype=torch.float64)
    with torch.no_grad():
        for n, p in bare.named_parameters():
            if not n.startswith("head"):
                p.copy_(changed[0][n] + changed[1][n] - p)
    x = images(model)
    for order in (["h0", "h1"], ["h1", "h0"]):
        vpeft.activate(model, order)
        assert (model(x) - bare(x)).abs().max() <= 1e-10
