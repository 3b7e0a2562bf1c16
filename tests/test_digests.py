"""Digests of weights: what they are, and that a remembered one is never of other values."""

import hashlib

import pytest
import timm
import torch

import vpeft
from vpeft import digests
from vpeft.digests import digest_of


def plain(named) -> str:
    """The digest, by its definition."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    wide = torch.randn(96, 130)
    return {
        "weight": torch.nn.Parameter(torch.randn(64, 3, 8, 8)),
        "turned": wide.t(),
        "half": torch.randn(3001).bfloat16(),
        "part": torch.randn(5000).bfloat16()[1:4000],  # begins in the middle of a word
        "small": torch.randn(3),
        "number": torch.tensor(7),
        "flags": torch.rand(9000) > 0.5,
        "nothing": torch.empty(0, 4),
        "broken": torch.full((4096,), float("nan")),
        "inferred": _inferred(),
    }


@torch.inference_mode()
def _inferred() -> torch.Tensor:
    return torch.randn(2000)


def test_it_is_sha256_of_names_shapes_types_and_bytes():
    named = list(tensors().items())
    assert digest_of(named) == plain(named)
    assert digest_of(named) == plain(named)
    assert digest_of(reversed(named)) == plain(reversed(named))


CHANGES = {
    "in place": lambda t: t["weight"].detach().add_(1e-6),
    "past the counter": lambda t: t["weight"].data.mul_(1 + 1e-6),
    "one bit": lambda t: t["weight"].data.view(torch.int32).view(-1)[777].bitwise_xor_(1),
    "numpy": lambda t: t["turned"].numpy().__setitem__((3, 4), 1.0),
    "another order": lambda t: t["weight"].data.copy_(t["weight"].data.flip(-2)),  # within every piece
    "two swapped": lambda t: t["weight"].data.view(-1).__setitem__([0, 2], t["weight"].data.view(-1)[[2, 0]]),
    "replaced": lambda t: setattr(t["weight"], "data", t["weight"].data + 1),
    "half": lambda t: t["half"].mul_(2),
    "part": lambda t: t["part"].mul_(2),
    "the end of it": lambda t: t["half"].__setitem__(3000, 5),
    "small": lambda t: t["small"].zero_(),
    "number": lambda t: t["number"].fill_(8),
    "flags": lambda t: t["flags"].logical_not_(),
    "not a number": lambda t: t["broken"].data.__setitem__(5, 0.0),
    "inferred": lambda t: torch.inference_mode()(t["inferred"].add_)(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_any_kind_is_seen(change):
    there = tensors()
    before = digest_of(there.items())
    CHANGES[change](there)
    assert digest_of(there.items()) == plain(there.items())
    assert digest_of(there.items()) != before


def _broken(*shape: int) -> torch.Tensor:
    return torch.randn(shape).index_fill_(0, torch.tensor(7), float("nan"))


KINDS = {
    "half": lambda: torch.randn(8192).mul_(0.02).half(),
    "bfloat16": lambda: torch.randn(8192).mul_(0.02).bfloat16(),
    "float": lambda: torch.randn(8192).mul_(0.02),
    "small beside large": lambda: torch.randn(8192).mul_(1e-6).index_fill_(0, torch.tensor(0), 1.0),
    "beside no number": lambda: _broken(8192),
    "index": lambda: torch.arange(8192),
    "flags": lambda: torch.rand(8192) > 0.5,
    "order": lambda: torch.eye(64, dtype=torch.int64).view(-1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_values_that_change_places_past_the_counter_are_seen(kind):
    torch.manual_seed(0)
    values = KINDS[kind]()
    word = max(8 // values.element_size(), 1)  # the same bytes of two words
    for _ in range(20):
        before = digest_of([("it", values)])
        places = torch.randint(4096 // 8, (2,)) * word  # of one piece
        one, other = values.data[places].clone()
        values.data[places] = values.data[places.flip(0)].clone()
        changed = not torch.equal(one, other)
        assert (digest_of([("it", values)]) != before) == changed


def test_an_index_in_another_order_is_seen():
    order = torch.eye(64, dtype=torch.int64)
    before = digest_of([("it", order)])
    order.data.copy_(
        order[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    )  # the same sums in all directions
    assert digest_of([("it", order)]) != before


def test_values_that_stay_the_same_are_hashed_once(monkeypatch):
    there = tensors()
    before = digest_of(there.items())
    monkeypatch.setattr(digests, "_hashed", lambda named: pytest.fail("hashed again"))
    assert digest_of(there.items()) == before


def test_few_are_remembered():
    one = torch.zeros(4096)
    for n in range(100):
        digest_of([("one", one.fill_(n))])
    assert len(digests._known) <= 64


def test_weights_that_a_user_changed_past_torch_are_refused(tmp_path):
    model = timm.create_model("vit_micro_patch4_28.vpeft_fashion", pretrained=True)
    vpeft.attach(model, "lora").save(tmp_path / "a.safetensors")
    fresh = timm.create_model("vit_micro_patch4_28.vpeft_fashion", pretrained=True)
    vpeft.load(fresh, tmp_path / "a.safetensors").detach()
    fresh.blocks[2].mlp.fc1.weight.data[0, 0] += 1e-3
    with pytest.raises(vpeft.CheckpointError, match="has other frozen weights"):
        vpeft.load(fresh, tmp_path / "a.safetensors")
    fresh.blocks[2].mlp.fc1.weight.data.copy_(model.blocks[2].mlp.fc1.weight.data)
    vpeft.load(fresh, tmp_path / "a.safetensors")
