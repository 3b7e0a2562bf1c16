"""Options: what the one validator takes and refuses, and that every option says what it may be."""

import dataclasses
import json
import time
import tracemalloc
from dataclasses import dataclass, field, is_dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import vpeft
from vpeft.bench.config import BenchConfig
from vpeft.cli import main
from vpeft.engine.config import Config, check_options
from vpeft.errors import ConfigError, MethodError
from vpeft.methods import METHODS
from vpeft.methods.adapter import Adapter
from vpeft.methods.base import Blocks, Method, create, per_block, which_blocks
from vpeft.options import (
    LARGEST,
    Option,
    allowed,
    check_values,
    checked,
    declared,
    fraction,
    nonnegative,
    option,
    probability,
    readable,
    section_of,
)


@dataclass
class Part:
    width: int = option(4, ge=1, le=8, unit="channels")


@dataclass
class Whole:
    count: int = option(3, ge=0)
    below: float = option(0.5, gt=0, lt=1)
    loose: float = 1.0
    flag: bool = False
    act: Literal["gelu", "relu"] = "gelu"
    scale: float | Literal["learned"] = nonnegative(1.0)
    sizes: int | list[int] = option(2, ge=0, le=9, length=(1, 3))
    pair: list[float] = option([0.5, 1.0], gt=0, length=2)
    nested: list[list[str]] | None = option(None, choices=("lora", "adapter"))
    path: str | None = option(None, free="a path")
    digits: str = option("7", free="digits", pattern="[0-9]+")
    weights: dict[str, float] = option({"ce": 1.0}, ge=0, free="weights")
    kwargs: dict[str, Any] = option({}, free="keywords")
    part: Part = field(default_factory=Part)
    parts: list[Part] = field(default_factory=list)


OPTIONS = {d.name: d for d in declared(Whole)}


def judge(name: str, value: Any) -> Any:
    return checked(OPTIONS[name], value, f"whole.{name}", MethodError)


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("count", 0, 0),
        ("count", LARGEST, LARGEST),
        ("below", 0.999, 0.999),
        ("loose", -3, -3.0),
        ("flag", True, True),
        ("act", "relu", "relu"),
        ("scale", "learned", "learned"),
        ("scale", 2, 2),
        ("sizes", (1, 2), [1, 2]),
        ("sizes", 9, 9),
        ("pair", (0.25, 1), [0.25, 1]),
        ("nested", [("lora",), ["adapter", "lora"]], [["lora"], ["adapter", "lora"]]),
        ("nested", None, None),
        ("path", "/a b", "/a b"),
        ("kwargs", {"a": float("nan")}, {"a": float("nan")}),
    ],
)
def test_accepted(name, value, kept):
    got = judge(name, value)
    assert repr(got) == repr(kept)  # the type too: 1 is not 1.0, a tuple no list


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", -1, r"whole\.count: -1 is impossible; it must be at least 0 and at most 1000000$"),
        ("count", 10**6 + 1, r"whole\.count: 1000001 is impossible"),
        pytest.param("count", 10**5000, r"whole\.count: a number of 16610 bits is impossible", id="unprintable"),
        ("count", True, r"whole\.count: True is no int$"),
        ("count", 1.0, r"whole\.count: 1\.0 is no int$"),
        ("count", "3", r"whole\.count: '3' is no int$"),
        ("count", None, r"whole\.count: None is no int$"),
        ("below", 0, r"whole\.below: 0 is impossible; it must be above 0 and below 1$"),
        ("below", 1.0, r"whole\.below: 1\.0 is impossible"),
        ("below", False, r"whole\.below: False is no float$"),
        ("loose", float("nan"), r"whole\.loose: nan is impossible; it must be at least -1000000 and at most 1000000$"),
        ("loose", float("inf"), r"whole\.loose: inf is impossible"),
        ("loose", -float("inf"), r"whole\.loose: -inf is impossible"),
        ("loose", 1e300, r"whole\.loose: 1e\+300 is impossible"),
        ("loose", -(10**400), r"whole\.loose: a number of 1329 bits is impossible"),
        ("flag", 1, r"whole\.flag: 1 is no bool$"),
        ("act", "rleu", r"whole\.act: 'rleu' is not one of gelu, relu; did you mean 'relu'\?$"),
        ("act", 3, r"whole\.act: 3 is not one of gelu, relu$"),
        ("act", [], r"whole\.act: \[\] is not one of gelu, relu$"),
        ("scale", "learnt", r"whole\.scale: 'learnt' is not one of learned and no float; did you mean 'learned'\?$"),
        ("scale", None, r"whole\.scale: None is no float and not one of learned$"),
        ("scale", -0.1, r"whole\.scale: -0\.1 is impossible"),
        ("sizes", [1, -2, 3], r"whole\.sizes\[1\]: -2 is impossible; it must be at least 0 and at most 9$"),
        ("sizes", [1, True], r"whole\.sizes\[1\]: True is no int$"),
        ("sizes", [], r"whole\.sizes: \[\] has 0 entries; it must have at least 1$"),
        ("sizes", [0] * 10**6, r"whole\.sizes: \[0, .*\] has 1000000 entries; it must have at most 3$"),
        ("sizes", [[]], r"whole\.sizes\[0\]: \[\] is no int$"),
        ("sizes", {}, r"whole\.sizes: \{\} is no int \| list\[int\]$"),
        ("pair", [1.0], r"whole\.pair: \[1\.0\] has 1 entries; it must have 2$"),
        ("pair", [1.0, float("nan")], r"whole\.pair\[1\]: nan is impossible"),
        ("nested", [["lora", "lroa"]], r"whole\.nested\[0\]\[1\]: 'lroa' is not one of lora, adapter; did you mean 'lora'"),
        ("nested", ["lora"], r"whole\.nested\[0\]: 'lora' is no list\[str\]$"),
        ("path", 3, r"whole\.path: 3 is no str \| None$"),
        pytest.param("path", "x" * 20_000, r"whole\.path: 'x+\.\.\.x+' is not a path$", id="long"),
        ("digits", "²", r"whole\.digits: '²' is not digits$"),
        ("weights", {"ce": -1.0}, r"whole\.weights\.ce: -1\.0 is impossible"),
        ("weights", {"ce": "x"}, r"whole\.weights\.ce: 'x' is no float$"),
        ("weights", [1.0], r"whole\.weights: \[1\.0\] is no dict\[str, float\]$"),
    ],
)  # fmt: skip
def test_refused(name, value, message):
    with pytest.raises(MethodError, match=message):
        judge(name, value)


def test_shipped_bounds():
    for made, good, bad in (
        (probability(0.0), (0, 0.5), (1, -0.1)),
        (fraction(0.5), (1, 0.1), (0, 1.1)),
        (nonnegative(0.0), (0, 5), (-1e-9,)),
    ):
        spec = made.metadata["vpeft"]
        assert all(map(spec.allows, good))
        assert not any(map(spec.allows, bad))


def test_a_subclass_keeps_the_bounds_of_a_default_that_it_changes():
    @dataclass
    class Base:
        rank: int = option(4, ge=1, le=8)

    @dataclass
    class Child(Base):
        rank: int = 2

    @dataclass
    class Wider(Base):
        rank: int = option(2, ge=0, le=16)

    assert [(d.default, d.option.le) for c in (Base, Child, Wider) for d in declared(c)] == [(4, 8), (2, 8), (2, 16)]


def test_mutable_defaults_are_not_shared():
    first, second = Whole(), Whole()
    first.pair.append(3.0)
    assert second.pair == [0.5, 1.0]
    assert vpeft.LoRA().targets is not vpeft.LoRA().targets
    assert Whole() == second
    assert repr(Whole()).startswith("Whole(count=3, below=0.5,")
    assert dataclasses.replace(second, count=5).count == 5


def test_configurations_are_walked_to_the_last_section():
    config = OmegaConf.structured(Whole)
    config.parts = [Part(), Part()]
    check_options(config)
    config.part.width = 9
    with pytest.raises(
        ConfigError, match=r"^part\.width: 9 is impossible; it must be at least 1 and at most 8 \(channels\)$"
    ):
        check_options(config)
    config.part.width, config.parts[1].width = 8, 0
    with pytest.raises(ConfigError, match=r"^parts\[1\]\.width: 0 is impossible"):
        check_options(config)
    with pytest.raises(ConfigError, match=r"^width: 'x' is no int$"):
        check_values(Part, {"width": "x"}, ConfigError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--size", "7"], "ConfigError: size: 7 is impossible; it must be at least 14"), (["--turn", "nan"], "turn: nan is")],
)
def test_the_command_line_refuses_motion_clips_that_cannot_be(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(["motion-clips", "--out", str(tmp_path / "m"), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_what_an_option_may_be_in_words():
    said = {name: allowed(d) for name, d in OPTIONS.items() if not is_dataclass(d.hint) and section_of(d.hint) is None}
    assert said == {
        "count": "0 or more",
        "below": "above 0, to below 1",
        "loose": "any number",
        "flag": "true or false",
        "act": "`gelu` or `relu`",
        "scale": "0 or more, or `learned`",
        "sizes": "0 to 9, or a list of such",
        "pair": "a list of 2, each above 0",
        "nested": "a list, each a list, each `lora` or `adapter`, or none",
        "path": "a path, or none",
        "digits": "digits",
        "weights": "weights, each 0 or more",
        "kwargs": "keywords",
    }
    assert readable(OPTIONS["scale"].hint) == "float | str"
    assert readable(OPTIONS["nested"].hint) == "list[list[str]] | None"


# ---- every option of every method, every key of every configuration ----


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


@pytest.mark.parametrize(("method", "this"), EVERY, ids=[f"{m}.{d.name}" for m, d in EVERY])
def test_strange_values_end_at_once_in_the_librarys_error(method, this):
    for value in STRANGE:
        start = time.process_time()
        got = made_or_refused(method, **{this.name: value})
        assert time.process_time() - start < 0.1, type(value)
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


@pytest.mark.parametrize("schema", [Config, BenchConfig])
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
    for key in ("rnak", "", "x" * 10**6):
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
