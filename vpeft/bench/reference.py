"""``vpeft bench --write-reference`` and ``--check``: ratios that are kept, and whether a later measurement agrees.

Bytes saved for backward are the same on every machine, and are compared to a percent. Times are compared on the processor
that the reference was measured on alone, within the noise that repeated measurements had there.
"""

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from ..engine.config import check_options
from ..errors import ConfigError
from ..files import refuse_unwritable, write_text
from .config import BenchConfig, check_table, load_tables
from .measure import measure
from .report import cell
from .result import Result
from .unfinished import machine_of

FORMAT = 1
MEMORY, MEMORY_NOISE = "saved/", 0.01
DIGITS = 6  # of a kept ratio: a head alone keeps a thousandth of what the limit does
LEAST_NOISE = 0.03  # of a time's ratio, however close the repeats were
WIDER = 2.0  # the spread of a few repeats is not yet that of many
JUDGED = ("step/limit", "step/full", "forward/frozen", "merged/frozen", "saved/limit", "saved/full")

Ratios = dict[str, dict[str, float]]  # by row and by ratio


class Compared(NamedTuple):
    """One ratio beside the reference's: ``moved`` where it is judged and further off than its noise."""

    table: str
    row: str
    ratio: str
    stored: float | None
    found: float | None
    noise: float
    judged: bool

    @property
    def moved(self) -> bool:
        if not self.judged:
            return False
        if self.stored is None or self.found is None:
            return True
        return abs(self.off) > self.noise

    @property
    def off(self) -> float:
        """How far it is above the reference's, as a share of that."""
        if not self.stored:
            return math.inf if self.found else 0.0
        return self.found / self.stored - 1

    def __str__(self) -> str:
        values = [("–" if v is None else f"{v:.3f}" if v >= 0.1 or not v else f"{v:.3g}") for v in (self.stored, self.found)]
        cells = (cell(self.table), cell(self.row), self.ratio, *values, f"{self.noise:.1%}", self._verdict())
        return f"| {' | '.join(cells)} |"

    def _verdict(self) -> str:
        if self.stored is None or self.found is None:
            return "gone" if self.found is None else "new"
        if not self.judged:
            return "not judged"
        if not self.moved:
            return "as before"
        return f"**{'larger' if self.found > self.stored else 'smaller'} by {abs(self.off):.1%}**"


def write_reference(file: str | Path, cfg: str | Path, overrides: Sequence[str] = (), repeats: int = 3) -> dict[str, Any]:
    """Measure every table of a configuration several times, and keep the ratios with their spread.

    Raises:
        ConfigError: a configuration that cannot be measured, or less than one repeat.
    """
    _check_repeats(repeats)
    refuse_unwritable(file)
    tables = load_tables(cfg, overrides)
    runs = _repeated({config.name: config for config in tables}, repeats)
    stored = {
        "format": FORMAT,
        "machine": machine_of(tables[0]),
        "repeats": repeats,
        "tables": {c.name: {"config": OmegaConf.to_container(c), "rows": _summed(runs[c.name])} for c in tables},
    }
    write_text(file, json.dumps(stored, indent=1) + "\n")
    print(
        f"{file}: {sum(len(t['rows']) for t in stored['tables'].values())} rows, each the median of {repeats} measurements"
    )
    return stored


def check_reference(file: str | Path, overrides: Sequence[str] = (), repeats: int = 1) -> list[Compared]:
    """Measure again what a reference holds; print the comparison, and give what moved.

    Args:
        file: that ``write_reference`` wrote.
        overrides: none: the settings are the reference's.
        repeats: measurements, of whose ratios the medians are taken.

    Raises:
        ConfigError: a file that is no reference, or settings beside it.
    """
    _check_repeats(repeats)
    if overrides:
        raise ConfigError(f"--check measures with the settings in {file}; leave out {overrides[0]}")
    stored = read_reference(file)
    configs = {name: _config_of(table["config"], file, name) for name, table in stored["tables"].items()}
    runs, compared = _repeated(configs, repeats), list[Compared]()
    for name, table in stored["tables"].items():
        here = machine_of(configs[name])
        same = all(stored["machine"][key] == here[key] for key in ("processor", "threads"))
        compared += _compared(name, table["rows"], _medians(runs[name]), same)
    print(_told(stored["machine"], here, compared))
    return [c for c in compared if c.moved]


def read_reference(file: str | Path) -> dict[str, Any]:
    """The contents of a reference.

    Raises:
        ConfigError: missing, or something else than a reference.
    """
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; vpeft bench --write-reference {path} --cfg FILE makes it")
    try:
        found = json.loads(path.read_text(errors="replace"))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("tables"), dict):
        raise ConfigError(f"{path} is no reference of format {FORMAT}; vpeft bench --write-reference makes one")
    return found


def _config_of(values: dict[str, Any], file: str | Path, name: str) -> DictConfig:
    try:
        config = OmegaConf.merge(OmegaConf.structured(BenchConfig), values)
    except Exception as error:  # a key that this version does not know
        raise ConfigError(f"{file}: the settings of {name}: {str(error).splitlines()[0]}") from error
    check_options(config)
    check_table(config)
    return config


def _repeated(configs: Mapping[str, DictConfig], repeats: int) -> dict[str, list[Ratios]]:
    """The ratios of each table as often as asked for, by its name; a line on stderr tells how long it will take."""
    runs: dict[str, list[Ratios]] = {name: [] for name in configs}
    total, begun = len(configs) * repeats, time.monotonic()
    for done, (name, config) in enumerate((item for item in configs.items() for _ in range(repeats)), 1):
        runs[name].append(_ratios(measure(config)))
        left = (time.monotonic() - begun) / done * (total - done) / 60
        print(f"[{done}/{total}] {name}; about {left:.0f} min left", file=sys.stderr, flush=True)
    return runs


def _check_repeats(repeats: int) -> None:
    if repeats < 1:
        raise ConfigError(f"--repeats: {repeats} is impossible; it must be at least 1")


def _ratios(results: Sequence[Result]) -> Ratios:
    return {r.label: {k: r.ratios[k] for k in JUDGED if k in r.ratios} for r in results if not r.left_out}


def _summed(runs: list[Ratios]) -> dict[str, dict[str, dict[str, float]]]:
    """By row and ratio the median, and the noise: what a later measurement may be off, as a share."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row, ratios in _medians(runs).items():
        found[row] = {}
        for key, middle in ratios.items():
            values = [run[row][key] for run in runs if key in run.get(row, {})]
            spread = (max(values) - min(values)) / middle if middle else 0.0
            noise = MEMORY_NOISE if key.startswith(MEMORY) else max(LEAST_NOISE, WIDER * spread)
            found[row][key] = {"median": float(f"{middle:.{DIGITS}g}"), "spread": round(spread, 4), "noise": round(noise, 4)}
    return found


def _medians(runs: list[Ratios]) -> Ratios:
    rows = {row: None for run in runs for row in run}
    return {
        row: {
            k: median(run[row][k] for run in runs if k in run.get(row, {}))
            for k in JUDGED
            if any(k in r.get(row, {}) for r in runs)
        }
        for row in rows
    }


def _compared(table: str, stored: dict[str, Any], found: Ratios, same_machine: bool) -> Iterator[Compared]:
    for row in [*stored, *(r for r in found if r not in stored)]:
        for key in JUDGED:
            old, new = stored.get(row, {}).get(key), found.get(row, {}).get(key)
            if old is None and new is None:
                continue
            judged = old is not None and (same_machine or key.startswith(MEMORY))
            yield Compared(table, row, key, old and old["median"], new, old["noise"] if old else 0.0, judged)


def _told(there: dict[str, Any], here: dict[str, Any], compared: list[Compared]) -> str:
    moved = [c for c in compared if c.moved]
    lines = [
        "| table | row | ratio | reference | now | noise | |",
        "|---|---|---|---:|---:|---:|---|",
        *map(str, compared),
        "",
    ]
    names = [f"{m['processor']}, {m['threads']} thread(s)" for m in (there, here)]
    if names[0] != names[1]:
        lines.append(f"Measured on {names[1]}, the reference on {names[0]}: only memory is judged, times are shown.")
    for package, version in there["versions"].items():
        if here["versions"].get(package) != version:
            lines.append(f"{package} is {here['versions'].get(package)} here, and was {version}.")
    rows = sorted({f"{c.table}: {c.row}" for c in moved})
    lines.append(f"{len(rows)} rows moved: {', '.join(rows)}" if rows else "No row moved.")
    return "\n".join(lines)
