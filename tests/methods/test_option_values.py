"""Every option of every method, every key of every configuration: what odd values end in, and that each has bounds."""

import json
import time
import tracemalloc
from dataclasses import dataclass, is_dataclass
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import vpeft
from vpeft.bench.config import BenchConfig, RoutingConfig
from vpeft.engine.config import Config, check_options
from vpeft.errors import MethodError
from vpeft.methods import METHODS
from vpeft.methods.adapter import Adapter
from vpeft.methods.base import Blocks, Method, create, per_block, which_blocks
from vpeft.options import (
    Option,
    declared,
    readable,
    section_of,
)


class Unprintable:
    """What cannot be shown, compared or hashed."""

    __hash__ = None

    def __repr__(self):
        raise RuntimeError

    def __eq__(self, other):
        raise RuntimeError


def nested(kind, depth=5000):
    """A list or tuple in a list or tuple, ..."""
    value = kind([1])
    for _ in range(depth):
        value = kind([value])
    return value


ITSELF = [0] * 300
ITSELF[:] = [ITSELF] * 300

EVERY = [(name, this) for name, cls in METHODS.items() for this in declared(cls)]
STRANGE = (
    None, "x", "", "²", True, float("nan"), float("inf"), -float("inf"), -1, 0, -0.5, 1e300, 2**31, 10**9, 10**400, [], [[]],
    [None], [-1], [float("nan")], [10**9], ["x"], (), {}, {"a": 1}, object(), b"x", 1j, 2**63, 10**5000, -1e9, {1},
    np.float32("nan"), np.int64(2**62), np.array([]), np.zeros(10**6), np.array(None), torch.tensor(8), torch.zeros(3),
    torch.zeros(1, device="meta"), range(10**12), range(10**30), [1] * 10**6, (1,) * 10**6, "x" * 10**6, int, iter([1]),
    Unprintable(), nested(list), nested(tuple), ITSELF, Decimal(8), Decimal("nan"), Fraction(1, 2), slice(3), 5e-324, -0.0,
)  # fmt: skip


def made_or_refused(method: str, **options) -> Method | str:
    """The method, or the error's text."""
    try:
        return create(method, **options)
    except MethodError as error:
        return str(error)


def timed(method: str, **options) -> tuple[Method | str, float]:
    """The same, and the seconds that it takes by itself: once more where Python collected all the garbage of the process
    in the middle of it."""
    for _ in range(3):
        start = time.thread_time()
        got = made_or_refused(method, **options)
        seconds = time.thread_time() - start
        if seconds < 0.1:
            break
    return got, seconds


@pytest.mark.parametrize(("method", "this"), EVERY, ids=[f"{m}.{d.name}" for m, d in EVERY])
def test_strange_values_end_at_once_in_the_librarys_error(method, this):
    for value in STRANGE:
        got, seconds = timed(method, **{this.name: value})
        assert seconds < 0.1, type(value)
        if isinstance(got, str):
            assert this.name in got
            assert len(got) < 1000
        else:
            assert create(method, **got.options()) == got
            json.dumps(got.options(), allow_nan=False)


def test_strange_values_take_no_memory():
    """Nothing is made of what is too long: not even a copy of it."""
    tracemalloc.start()
    try:
        for method, this in {readable(this.hint): (method, this) for method, this in EVERY}.values():  # one of each type
            for value in STRANGE:
                made_or_refused(method, **{this.name: value})
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("method", "this"), EVERY, ids=[f"{m}.{d.name}" for m, d in EVERY])
def test_no_number_is_without_an_end(method, this):
    """Whatever the type, what is not finite or far too large is never taken."""
    for value in (float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 10**13, -(10**13)):
        for wrapped in (value, [value], [[value]]):
            with pytest.raises(MethodError, match=this.name):
                create(method, **{this.name: wrapped})


def says(this) -> bool:
    """The field itself says what it may be: by a bound, choices, a text on what it is, or by its type."""
    spec, kinds = this.option, readable(this.hint)
    numbers = "int" in kinds or "float" in kinds
    bounded = (spec.ge, spec.gt) != (None, None) or (spec.le, spec.lt) != (None, None) or "mean" in this.name
    texts = "Literal" in str(this.hint) or spec.choices or spec.free
    return bool((bounded or not numbers) and (texts or "str" not in kinds) and (spec != Option() or not numbers))


@pytest.mark.parametrize(("method", "this"), EVERY, ids=[f"{m}.{d.name}" for m, d in EVERY])
def test_every_option_says_what_it_may_be(method, this):
    assert says(this), f"{method}.{this.name} has neither bound nor choices nor a word on its text"


def keys(schema: type, path: str = ""):
    for this in declared(schema):
        section = this.hint if is_dataclass(this.hint) else section_of(this.hint)
        if section is None:
            yield f"{path}{this.name}", this
        else:
            yield from keys(section, f"{path}{this.name}.")


@pytest.mark.parametrize("schema", [Config, BenchConfig, RoutingConfig])
def test_every_key_says_what_it_may_be(schema):
    found = dict(keys(schema))
    assert len(found) > 15
    assert [path for path, this in found.items() if not says(this)] == []
    check_options(OmegaConf.structured(schema))  # and its default is among it


def test_presets_are_within_the_bounds():
    for name, cls in METHODS.items():
        for preset in cls.presets:
            create(name, preset=preset)


@pytest.mark.parametrize(
    ("method", "option", "given", "kept"),
    [
        ("lora", "rank", np.int64(4), 4),
        ("lora", "rank", np.array(4), 4),
        ("lora", "rank", np.array([4, 0, 4]), [4, 0, 4]),
        ("lora", "rank", [np.int16(4), 2], [4, 2]),
        ("lora", "blocks", range(8, 11), [8, 9, 10]),
        ("lora", "blocks", np.arange(2), [0, 1]),
        ("lora", "scale", np.float32(0.5), 0.5),
        ("lora", "dropout", np.float64(0.25), 0.25),
        ("lora", "dropout", np.int8(0), 0.0),
        ("adapter", "norm", np.bool_(True), True),
        ("adapter", "act", np.str_("relu"), "relu"),
        ("s4", "groups", (("lora",), ["adapter"]), [["lora"], ["adapter"]]),
    ],
)
def test_numbers_and_lists_of_numpy_are_plain_ones(method, option, given, kept):
    got = getattr(create(method, **{option: given}), option)
    assert repr(got) == repr(kept)  # the type too


@pytest.mark.parametrize("given", [np.int64(-1), np.float64(8.0), np.bool_(True), np.array([4.5]), np.array([[4]])])
def test_numbers_of_numpy_have_the_same_bounds(given):
    with pytest.raises(MethodError, match=r"^lora\.rank"):
        create("lora", rank=given)


def test_attributes_that_were_set_later_are_checked_when_the_method_is_used():
    method = vpeft.LoRA(alpha=4.0)
    method.alpha = float("nan")
    with pytest.raises(MethodError, match=r"^lora\.alpha: nan is impossible"):
        create(method)
    method.alpha, method.rank = 8, np.int64(2)
    assert create(method) is method
    assert method.options() == vpeft.LoRA(alpha=8, rank=2).options()


def test_a_class_that_is_no_method_by_itself():
    for cls in (Method, Adapter):
        with pytest.raises(MethodError, match=f"^{cls.__name__} is no method by itself"):
            create(cls)


@pytest.mark.parametrize("preset", [5, [], {}, "", "pfet", True, b"peft", 0, "x" * 10**6])
def test_presets_that_are_none(preset):
    with pytest.raises(MethodError, match=r"^lora has no preset") as found:
        create("lora", preset=preset)
    assert len(str(found.value)) < 1000
    with pytest.raises(MethodError, match="not to both"):
        create(vpeft.LoRA(), preset=preset)


@pytest.mark.parametrize("method", [None, 5, [], {}, "", "lroa", b"lora", "x" * 10**6, int, True, Unprintable()], ids=type)
def test_methods_that_are_none(method):
    with pytest.raises(MethodError, match=r"unknown method|expected a method") as found:
        create(method)
    assert len(str(found.value)) < 1500


def test_options_that_are_none():
    for key in ("rnak", "", "x" * 10**6, "method", "self"):
        with pytest.raises(MethodError, match=r"^lora has no hyper-parameter") as found:
            create("lora", **{key: 3})
        assert len(str(found.value)) < 1000


def test_no_list_stands_for_the_default_list():
    assert vpeft.LoRA(targets=None) == vpeft.LoRA()
    assert vpeft.IncreLoRA(targets=None).targets == ["q", "k", "v", "proj", "fc1", "fc2"]


@pytest.mark.parametrize(
    "blocks", ["²", "1²", "", ",", "1,,2", "-1", "1-", "1--2", "a", "0-99999", "٣", [], [1.5], ["1"], 2**31]
)
@pytest.mark.parametrize("method", ["lora", "e2vpt", "compacter"])
def test_blocks_that_are_none(method, blocks):
    with pytest.raises(MethodError, match=rf"{method}\.blocks"):
        create(method, blocks=blocks)


@pytest.mark.parametrize("blocks", ["0", " 0 , 2 - 5 ", "8-11", [-1], 3, [0, 4], None, (1, 2)])
def test_blocks_that_are_some(blocks):
    create("lora", blocks=blocks)


@pytest.mark.parametrize(
    "options",
    [{"n": 0}, {"n": -4}, {"reduction": 0}, {"rank": 0}, {"rule_std": -1.0}, {"rule_std": float("nan")}, {"bottleneck": -8}],
)
@pytest.mark.parametrize("method", ["compacter", "compacter_plus_plus"])
def test_compacter_has_bounds(method, options):
    with pytest.raises(MethodError, match=rf"{method}\.{next(iter(options))}: .* is impossible"):
        create(method, **options)


def test_a_method_of_ones_own_needs_no_options():
    """Plain fields are checked by their types, and by the bound that every number has."""

    @dataclass
    class Own(Method):
        width: int = 3
        blocks: Blocks = which_blocks()
        sizes: int | list[int] = per_block(2, "channels")

    Own.name = "own"
    assert Own(width=5).options() == {"width": 5, "blocks": None, "sizes": 2}
    for wrong in ({"width": 2**31}, {"width": 1.5}, {"sizes": [-1]}, {"blocks": "²"}):
        with pytest.raises(MethodError, match=rf"own\.{next(iter(wrong))}"):
            Own(**wrong)
