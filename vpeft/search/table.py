"""One search under several seeds: run where not yet run, as Markdown and JSON."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..engine.plan import place
from ..engine.settings import differences, harmful, refuse_keys, said
from ..errors import ConfigError
from ..files import write_text
from ..tasks.registry import get_task
from .config import RANDOM, SUPERNET, WINNER, check_search, load_search_config, stored_search
from .driver import search
from .folder import ASKED, RESULT

STAGES = (SUPERNET, "search", WINNER)


def searches(
    file: str | Path, overrides: Sequence[str] = (), *, seeds: Sequence[int] = (0, 1, 2), out: str | Path = "runs/search"
) -> list[dict[str, Any]]:
    """Run one search under every seed; returns the rows of the table: what was found, and by random search where that ran.

    A search is ``OUTPUT/NAME-seedS``. Finished ones are read, not repeated, and an unfinished one goes on.

    Args:
        file: the YAML configuration.
        overrides: ``key.sub=value`` for all of them.
        seeds: of the searches.
        out: path without suffix of the results (``.md``, ``.json``).

    Raises:
        VpeftError: a configuration that cannot work, or finished searches with other settings.
    """
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds: {' '.join(map(str, seeds))} has a seed twice, whose searches would be one")
    refuse_keys(overrides, {"seed": "the searches' seeds are those of --seeds; leave it out"})
    configs = []
    for seed in seeds:
        config = load_search_config(file, [*overrides, f"seed={seed}"])
        config.name = f"{config.name}-seed{seed}"
        check_search(config)
        configs.append(config)
    done = [_is_done(config) for config in configs]  # all are looked at before the first one starts
    for number, (config, finished) in enumerate(zip(configs, done, strict=True), 1):
        if not finished:
            search(config, last=number == len(configs))
    found = [json.loads((place(config) / RESULT).read_text()) for config in configs]
    key = f"test_{get_task(configs[0]).monitor}"
    rows = [_row(found[0]["algorithm"], found, key, [r["seconds"] for r in found])]
    if all(RANDOM in r for r in found):
        times = [
            {SUPERNET: s[SUPERNET], "search": s.get("random_search"), WINNER: s.get("random_winner", s[WINNER])}
            for s in (r["seconds"] for r in found)
        ]
        rows.append(_row(RANDOM, [r[RANDOM] for r in found], key, times))
    text = markdown(rows, f"test {found[0]['metric']}")
    if os.environ.get("RANK", "0") == "0":  # of several processes one writes
        write_text(Path(f"{out}.json"), json.dumps(rows, indent=1))
        write_text(Path(f"{out}.md"), text + "\n")
        print(text)
    return rows


def _is_done(config: Any) -> bool:
    path = place(config)
    if not (path / RESULT).exists() or not (path / ASKED).exists() or config.overwrite:
        return False
    changes = harmful(differences(stored_search(path), config), finished=True, config=config)
    if changes:
        raise ConfigError(
            f"{path} is a finished search with other settings than those asked for: {said(changes)}; give another name=… or "
            "output=…, or overwrite=true to run it anew"
        )
    return True


def _row(name: str, found: list[dict[str, Any]], key: str, times: list[dict[str, float]]) -> dict[str, Any]:
    scores = [r[key] for r in found if key in r]
    return {
        "algorithm": name,
        "parameters": [r["parameters"] for r in found],
        "with_head": [r["with_head"] for r in found],
        "evaluations": [r["evaluations"] for r in found],
        "scores": scores,
        "mean": mean(scores) if scores else None,
        "std": stdev(scores) if len(scores) > 1 else None,
        "seconds": {stage: [t.get(stage) for t in times] for stage in STAGES},
    }


def markdown(rows: Sequence[dict[str, Any]], title: str) -> str:
    """The rows as a Markdown table."""
    lines = [
        f"| search | parameters | evaluations | {title} | seeds | supernet, s | search, s | winner, s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        spread = "" if r["std"] is None else f" ± {r['std']:.2f}"
        score = "–" if r["mean"] is None else f"{r['mean']:.2f}{spread}"
        times = [_mean(r["seconds"][stage]) for stage in STAGES]
        lines.append(
            f"| {r['algorithm']} | {_span(r['parameters'])} | {_span(r['evaluations'])} | {score} | {len(r['parameters'])} "
            f"| {' | '.join(times)} |"
        )
    return "\n".join(lines)


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _mean(numbers: Sequence[float | None]) -> str:
    known = [n for n in numbers if n is not None]
    return f"{mean(known):.0f}" if known else "–"
