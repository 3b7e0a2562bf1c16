"""Packages import downward only, and no task knows another."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vpeft

ROOT = Path(vpeft.__file__).parent
# From the bottom to the top; what stands together may import each other.
FLOORS = [
    {"errors", "files", "numerics"}, {"backbone"}, {"interventions"}, {"methods"}, {"tuning"}, {"data"}, {"tasks"},
    {"engine"}, {"integrations"}, {"bench", "docs"}, {"cli"},
]  # fmt: skip
HEIGHT = {name: height for height, names in enumerate(FLOORS) for name in names}
TASKS = ("classification", "segmentation", "video")
# Where imports for type hints alone count too.
SWEPT = sorted(f for top in ("data", "tasks", "engine", "integrations", "bench", "docs") for f in (ROOT / top).rglob("*.py"))
SWEPT += [ROOT / f"{name}.py" for name in ("errors", "files", "numerics", "cli")]


def imported(file: Path) -> Iterator[tuple[str, ...]]:
    """The modules of vpeft that a file imports anywhere, also inside functions, as parts of their paths."""
    package = file.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            found = (*base, *(node.module.split(".") if node.module else ()))
            yield from [found] if node.module else [(*base, alias.name) for alias in node.names]


@pytest.mark.parametrize("file", SWEPT, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_imports_lead_downward(file):
    own = file.relative_to(ROOT).with_suffix("").parts
    for target in imported(file):
        assert HEIGHT[target[0]] <= HEIGHT[own[0]], f"{'.'.join(own)} imports {'.'.join(target)}, which stands above it"
        if own[0] == target[0] == "tasks" and own[1] in TASKS and len(target) > 1:
            assert target[1] not in set(TASKS) - {own[1]}, f"the task {own[1]} imports the task {target[1]}"


def test_only_the_registry_names_tasks():
    """The engine, the benchmarks and what tasks share go through ``get_task``; the configuration's sections are their own."""
    allowed = {"tasks/registry.py", "tasks/text.py", "engine/config.py", "bench/decode.py", "cli.py"}
    for file in SWEPT:
        name = file.relative_to(ROOT).as_posix()
        if name in allowed or name.startswith((*(f"tasks/{t}/" for t in TASKS), "integrations/mmseg/")):
            continue
        for target in imported(file):
            assert target[:1] != ("tasks",) or target[1:2] not in [(t,) for t in TASKS], f"{name} imports a task's package"
