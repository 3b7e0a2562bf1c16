"""What concerns every registered method at once."""

from pathlib import Path

import vpeft
from tests.support.models import make
from vpeft.methods import METHODS


def test_every_method_has_a_formula():
    """A method that is registered without a test of its own fails here."""
    sources = "".join(p.read_text() for p in Path(__file__).parent.glob("test_*.py"))
    assert not [m for m in METHODS if f'"{m}"' not in sources]


def test_weight_decay_leaves_vectors_and_prompts_alone():
    def groups(method, **options):
        handle = vpeft.attach(make("vit"), method, **options)
        names = {id(p): n for n, p in [*handle.named_parameters(), *handle.head_parameters()]}
        found = {True: set(), False: set()}
        for g in handle.param_groups(lr=1.0, weight_decay=0.1, head_lr=3.0):
            assert g["lr"] == (3.0 if g["name"] == "head" else 1.0)
            found[g["weight_decay"] > 0] |= {names[id(p)] for p in g["params"]}
        return found

    assert groups("ssf")[True] == {"head.weight"}
    assert groups("vpt_deep")[True] == {"head.weight"}
    assert groups("vpt_deep", project=8)[True] == {"head.weight", "vpt.proj.weight"}
    assert groups("bitfit")[True] == {"head.weight"}
    assert groups("lora", rank=1)[True] == {"head.weight"} | {
        f"blocks.{i}.attn.qkv.lora.{s}.{f}" for i in range(3) for s in "qv" for f in "ab"
    }
    assert groups("adaptformer", scale="learnable")[False] == {"head.bias"} | {
        f"blocks.{i}.adaptformer.{n}" for i in range(3) for n in ("down.bias", "up.bias", "scale")
    }
    full = groups("full")[False]
    assert {"pos_embed", "cls_token", "norm.weight", "blocks.0.norm1.bias"} <= full
