"""Options: what the one validator takes and refuses."""

import dataclasses
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf

import vpeft
from vpeft.cli import main
from vpeft.engine.config import check_options
from vpeft.errors import ConfigError, MethodError
from vpeft.options import (
    LARGEST,
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
