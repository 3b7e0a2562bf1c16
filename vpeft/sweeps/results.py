"""What a sweep leaves for people: ``sweep.md``, ``sweep.json``, ``trials.csv`` and two pictures."""

import csv
import io
import json
import warnings
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import write_text
from .pictures import draw_importance, draw_parallel
from .study import SharedStudy

SHOWN = 15  # trials in the table


def write_results(path: Path, shared: SharedStudy, monitor: str, winner: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write all of them; returns what ``sweep.json`` holds.

    Args:
        path: of the sweep's folder.
        shared: the study.
        monitor: the validation metric.
        winner: its test results, where there are any yet.

    Raises:
        ConfigError: no trial came to its end; says why.
    """
    trials = [t for t in shared.trials() if t.state.is_finished()]
    complete = sorted((t for t in trials if t.state.name == "COMPLETE"), key=lambda t: (-t.value, t.number))
    write_text(path / "trials.csv", _csv(trials, shared, monitor))
    if not complete:
        reasons = dict.fromkeys(str(t.user_attrs.get("reason")) for t in trials)
        raise ConfigError(f"no trial came to its end: {'; '.join(list(reasons)[:3]) or 'none was begun'}")
    best = complete[0]
    importance = importances(shared, complete)
    result = {
        "study": shared.study.study_name,
        "trial": best.number,
        "settings": shared.space.settings(best.params),
        f"val_{monitor}": best.value,
        "trials": {s: sum(t.state.name == s for t in trials) for s in ("COMPLETE", "PRUNED", "FAIL")},
        "importance": importance,
        "winner": winner,
    }
    write_text(path / "sweep.json", json.dumps(result, indent=1))
    write_text(path / "sweep.md", markdown(result, complete, trials, shared, monitor))
    if importance:
        draw_importance(path / "importance.png", importance)
    draw_parallel(path / "parallel.png", shared.space, complete, f"val {monitor}")
    return result


def importances(shared: SharedStudy, complete: list[Any]) -> dict[str, float]:
    """Each key's share in what made trials differ (Optuna's own measure); empty where they do not tell."""
    if len(complete) < 4 or len({t.value for t in complete}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = shared.optuna.importance.get_param_importances(shared.study)
        except (ValueError, RuntimeError):  # no variance, or keys that never varied
            return {}
    return {key: float(share) for key, share in found.items()}


def markdown(result: dict[str, Any], complete: list[Any], trials: list[Any], shared: SharedStudy, monitor: str) -> str:
    """The page of a sweep."""
    keys = [p.key for p in shared.space.parts]
    counts = result["trials"]
    lines = [
        f"# {result['study']}",
        "",
        f"{len(trials)} trials: {counts['COMPLETE']} complete, {counts['PRUNED']} pruned, {counts['FAIL']} failed. "
        "They were compared on validation data.",
        "",
    ]
    if result["winner"]:
        found = result["winner"]
        spread = "" if found["std"] is None else f" ± {found['std']:.2f}"
        lines += [f"Winner: trial {result['trial']}, test {monitor} **{found['mean']:.2f}{spread}** over "
                  f"{len(found['seeds'])} seeds.", ""]  # fmt: skip
    lines += [f"| trial | val {monitor} | {' | '.join(keys)} |", "|---:|---:|" + "---|" * len(keys)]
    for t in complete[:SHOWN]:
        settings = shared.space.settings(t.params)
        lines.append(f"| {t.number} | {t.value:.2f} | {' | '.join(_cell(settings.get(k)) for k in keys)} |")
    if len(complete) > SHOWN:
        lines.append(f"\n{len(complete) - SHOWN} more are in trials.csv.")
    failed = [t for t in trials if t.state.name == "FAIL"]
    if failed:
        lines += ["", "Failed:", ""] + [f"- trial {t.number}: {t.user_attrs.get('reason')}" for t in failed[:SHOWN]]
    return "\n".join(lines) + "\n"


def _csv(trials: list[Any], shared: SharedStudy, monitor: str) -> str:
    keys = [p.key for p in shared.space.parts]
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["trial", "state", f"val_{monitor}", "epochs", "seconds", *keys, "folder", "reason"])
    for t in trials:
        settings, about = shared.space.settings(t.params), t.user_attrs
        seen = len(t.intermediate_values)
        table.writerow([t.number, t.state.name, "" if t.value is None else t.value, seen, about.get("seconds", ""),
                        *(_cell(settings[k]) if k in settings else "" for k in keys), about.get("folder", ""),
                        about.get("reason", "")])  # fmt: skip
    return out.getvalue()


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)
