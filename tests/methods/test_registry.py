"""What concerns every registered method at once."""

import ast
import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

import tests.methods
import vpeft
from tests.support.compare import compare
from tests.support.models import attached, make
from tests.support.reference import Reference
from vpeft.methods import METHODS


def compared_methods(test: Callable, module: ModuleType) -> set[str]:
    """Methods whose outputs a test compares with a formula, as it calls for that.

    That is a call of ``compare``, or of ``attached`` in a test that itself calls a ``Reference`` and asserts. A method is
    named in the call, or comes through the test's parameters.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(test)))
    calls = [
        (vars(module).get(n.func.id), n) for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    ]
    names = [call.args[1] for function, call in calls if function is compare]
    by_hand = any(isinstance(f, type) and issubclass(f, Reference) for f, _ in calls)
    if by_hand and any(isinstance(n, ast.Assert) for n in ast.walk(tree)):
        names += [call.args[1] for function, call in calls if function is attached]
    given = parameters(test)
    return {
        value
        for name in names
        for value in ([name.value] if isinstance(name, ast.Constant) else given.get(ast.unparse(name), ()))
    }


def parameters(test: Callable) -> dict[str, list]:
    """Values of a test's parameters, as its marks give them."""
    found: dict[str, list] = {}
    for mark in getattr(test, "pytestmark", ()):
        if mark.name != "parametrize":
            continue
        names, values = mark.args
        if isinstance(names, str):
            names, values = [names], [(v,) for v in values]
        for i, name in enumerate(names):
            found[name] = [(v.values if hasattr(v, "values") else v)[i] for v in values]
    return found


def active(module: ModuleType) -> Iterator[Callable]:
    for name, value in vars(module).items():
        marks = {mark.name for mark in getattr(value, "pytestmark", ())}
        if name.startswith("test_") and inspect.isfunction(value) and not marks & {"skip", "skipif", "slow", "xfail"}:
            yield value


def test_every_method_is_compared_with_a_formula():
    """A method that is registered without a test of its formula fails here."""
    compared: set[str] = set()
    for info in pkgutil.iter_modules(tests.methods.__path__, "tests.methods."):
        module = importlib.import_module(info.name)
        for test in active(module):
            compared |= compared_methods(test, module)
    assert set(METHODS) - compared == set()


def by_name(kind):
    compare(kind, "lora", Reference)


@pytest.mark.parametrize(("method", "options"), [("ssf", {}), ("mona", {})])
def by_parameter(kind, method, options):
    compare(kind, method, Reference, **options)


def by_hand(kind):
    model = make(kind)
    handle = attached(model, "bitfit")
    assert Reference(model, {}, handle.state_dict())


def without_a_formula(kind):
    assert attached(make(kind), "bitfit").method.name == "bitfit"
    assert "lora" in METHODS, 'compare(kind, "lora", Reference)'


def test_what_counts_as_a_comparison():
    module = importlib.import_module(__name__)
    found = {f.__name__: compared_methods(f, module) for f in (by_name, by_parameter, by_hand, without_a_formula)}
    assert found == {"by_name": {"lora"}, "by_parameter": {"ssf", "mona"}, "by_hand": {"bitfit"}, "without_a_formula": set()}


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
