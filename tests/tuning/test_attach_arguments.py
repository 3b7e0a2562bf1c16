"""What is given to ``attach`` beside the method's options: refused before anything changes where it cannot be."""

import numpy as np
import pytest
from torch import nn

import vpeft
from tests.support.models import make


def refused(message: str, **arguments) -> None:
    model = make("vit")
    names = [*model.state_dict()]
    if callable(arguments.get("heads")) and not isinstance(arguments["heads"], nn.Module):
        arguments["heads"] = arguments["heads"](model)
    with pytest.raises(vpeft.MethodError, match=message) as found:
        vpeft.attach(model, "lora", **arguments)
    assert len(str(found.value)) < 600
    assert [*model.state_dict()] == names
    assert not hasattr(model, "vpeft")


@pytest.mark.parametrize(
    "name",
    [5, 0, False, [], {}, "", b"x", "a b", "a.b", "1a", "²", "x" * 10**6, object(), "hub"],
    ids=lambda n: repr(n)[:12],
)
def test_names_that_are_none(name):
    refused("^name: ", name=name)


@pytest.mark.parametrize("heads", [5, 0, False, "", "x", [], [nn.Linear(2, 2)], nn.Linear(2, 2), object()], ids=type)
def test_heads_that_are_no_mapping(heads):
    refused(r"^heads: expected modules by name, such as \{'decode_head': module\}, got ", heads=heads)


@pytest.mark.parametrize("name", [5, None, ("a",), "", "a.b", "head"])
def test_names_of_heads_that_are_none(name):
    refused(r"^heads: .* must be letters", heads={name: nn.Linear(2, 2)})


@pytest.mark.parametrize("head", [5, None, nn.Linear, "x" * 10**6], ids=type)
def test_heads_that_are_no_modules(head):
    refused(r"^heads: 'a' is no module but", heads={"a": head})


def test_heads_that_hold_a_part_of_the_model():
    refused("^heads: 'a' is or holds a part of the model", heads=lambda model: {"a": model.blocks[0]})
    refused("^heads: 'a' is or holds a part of the model", heads=lambda model: {"a": nn.Sequential(model.head)})

    def tied(model):
        linear = nn.Linear(32, 5)
        linear.weight = model.head.weight
        return {"a": linear}

    refused("^heads: 'a' is or holds a part of the model", heads=tied)


def test_heads_that_share_a_part():
    shared = nn.Linear(2, 2)
    refused("^heads: 'b' and 'a' share a part", heads={"a": shared, "b": nn.Sequential(shared)})


def test_heads_in_a_module_dict():
    handle = vpeft.attach(make("vit"), "lora", heads=nn.ModuleDict({"a": nn.Linear(2, 2)}))
    assert "a.weight" in handle.head_state_dict()


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (-4, "no block -4; this model has blocks 0 to 2"),
        (3, "no block 3"),
        ("0-3", "no block 3"),
        ("2-0", "runs backwards"),
        (True, "True is no"),
        (range(0), r"\[\] has 0 entries"),
        (range(10**9), r"range\(0, 1000000000\) is no"),
        (np.array([True, False, True]), r"blocks\[0\]: True is no int"),
        (np.array([[0]]), r"blocks\[0\]: \[0\] is no int"),
        ({0}, r"\{0\} is no"),
    ],
    ids=str,
)
def test_blocks_that_the_model_has_not(blocks, message):
    refused(message, blocks=blocks)


@pytest.mark.parametrize("blocks", [np.int64(1), range(1, 2), np.array([1]), [np.int32(-2)], (1,), "1", -2], ids=str)
def test_ways_to_name_a_block(blocks):
    handle = vpeft.attach(make("vit"), "lora", blocks=blocks)
    assert {n.split(".")[1] for n, _ in handle.named_parameters()} == {"1"}


@pytest.mark.parametrize("name", [5, [], b"lora", "", "x" * 10**6], ids=type)
def test_names_that_no_handle_has(name):
    model = make("vit")
    vpeft.attach(model, "lora")
    with pytest.raises(vpeft.MethodError, match="is not attached") as found:
        vpeft.get_handle(model, name)
    assert len(str(found.value)) < 600


def test_categories_that_are_none():
    for category in ([], 5, "x"):
        with pytest.raises(vpeft.VpeftError, match="no category"):
            vpeft.list_methods(category)
