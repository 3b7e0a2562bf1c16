"""The house: imports point downward only and make no circle, also those for type checkers and inside functions."""

import ast
from pathlib import Path

import vpeft
from vpeft.methods import METHODS

ROOT = Path(vpeft.__file__).parent
# From the ground up. A module imports from its own floor or from below. See docs/architecture.md.
FLOORS = (
    ("beside_timm", "errors", "files", "numerics", "options", "shards", "stopping", "version"),
    ("backbone",),
    ("checkpoint", "digests", "fetching", "metadata"),
    ("interventions",),
    ("attached",),
    ("methods",),
    ("api", "tuning"),
    ("data",),
    ("tasks",),
    ("reporting",),
    ("engine",),
    ("integrations",),
    ("bench", "demo", "docs", "export", "search", "serving", "suites", "sweeps", "zoo"),
    ("commands",),
    ("cli",),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name without ``vpeft.``; the package itself is ``""``."""
    found = {}
    for file in sorted(ROOT.rglob("*.py")):
        parts = list(file.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(name: str, file: Path, known: dict[str, Path]) -> set[str]:
    """The package's own modules that one of them imports, wherever in its text."""
    package = name.split(".") if file.name == "__init__.py" and name else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            inside = bool(node.level) or (node.module or "").split(".")[0] == "vpeft"
            if not inside:
                continue
            module = node.module or ""
            if not node.level:
                module = module.partition(".")[2]
            path = ".".join([*base, *([module] if module else [])])
            for alias in node.names:
                inner = f"{path}.{alias.name}".lstrip(".")
                found.add(inner if inner in known else path)
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "vpeft"}
    return found - {name}


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(name, file, known) for name, file in known.items()}


def test_every_module_stands_on_a_floor():
    assert {name.split(".")[0] for name in modules() if name} == set(FLOOR)


def test_imports_point_downward():
    upward = [
        f"{name} -> {other}"
        for name, others in graph().items()
        for other in others
        if name and other and FLOOR[other.split(".")[0]] > FLOOR[name.split(".")[0]]
    ]
    assert not upward


def test_nothing_below_imports_the_package_itself():
    assert not [name for name, others in graph().items() if name and "" in others]


def test_no_circles():
    arrows = graph()

    def reached(start: str) -> set[str]:
        seen, todo = set(), list(arrows[start])
        while todo:
            if (name := todo.pop()) not in seen:
                seen.add(name)
                todo += arrows.get(name, ())
        return seen

    assert not [name for name in arrows if name in reached(name)]


def test_tasks_do_not_import_each_other():
    tasks = [p.name for p in (ROOT / "tasks").iterdir() if p.is_dir() and (p / "__init__.py").exists()]
    assert len(tasks) >= 3
    mixed = [
        f"{name} -> {other}"
        for name, others in graph().items()
        for other in others
        for task in tasks
        if name.startswith(f"tasks.{task}") and other.startswith("tasks.") and other.split(".")[1] in set(tasks) - {task}
    ]
    assert not mixed


def test_no_file_is_long():
    long = {str(f.relative_to(ROOT)): n for f in ROOT.rglob("*.py") if (n := len(f.read_text().splitlines())) > 400}
    assert not long


def test_no_class_name_is_used_twice():
    names: dict[str, list[str]] = {}
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                names.setdefault(node.name, []).append(name)
    assert not {name: where for name, where in names.items() if len(where) > 1}


def test_only_the_registry_names_tasks():
    """The engine, the benchmarks and what tasks share go through the registry; the configuration's sections are data."""
    allowed = {
        "tasks.registry",
        "tasks.text",
        "engine.config",
        "bench.decode",
        "bench.config",
        "docs.configuration",
        "commands.making",
    }
    tasks = [p.name for p in (ROOT / "tasks").iterdir() if p.is_dir() and (p / "__init__.py").exists()]
    named = [
        f"{name} -> {other}"
        for name, others in graph().items()
        for other in others
        if other.startswith(tuple(f"tasks.{task}" for task in tasks))
        and not name.startswith(("integrations.mmseg", *(f"tasks.{task}" for task in tasks)))
        and name not in allowed
    ]
    assert not named


def test_only_methods_name_methods():
    """Outside ``methods/`` no module names a registered method in its code; a configuration has to start from one."""
    distinctive = {m for m in METHODS if len(m) > 4 and m not in ("linear", "partial", "prefix", "attention", "adapter")}
    found = []
    for name, file in modules().items():
        if name.startswith("methods") or name == "engine.config":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and node.value in distinctive:
                found.append(f"{name}: {node.value!r} in line {node.lineno}")
    assert not found
