"""Which runs of a list no method can do, because it cannot be attached to the backbone."""

from collections.abc import Callable, Mapping
from typing import Any

from ..data.generated.offline import TASKS
from ..errors import UnsupportedModelError
from ..tasks.models import make_method
from ..tasks.registry import get_task
from ..tuning.attaching import attach
from .runner import Job


def without_refused(jobs: Mapping[Any, Job], say: Callable[[str], Any] = print) -> dict[Any, Job]:
    """The jobs but for those whose method cannot be attached, of which a line tells.

    Args:
        jobs: by key, whose first and third parts are the backbone and the entry, the second the task.
        say: called with a line for each backbone and entry that is left out.
    """
    reasons: dict[tuple[str, str], str | None] = {}
    for key, planned in jobs.items():
        pair = key[0], key[2]
        if pair in reasons:
            continue
        reasons[pair] = _why_refused(planned, len(TASKS[key[1]].classes))
        if reasons[pair]:
            of = sum((other[0], other[2]) == pair for other in jobs)
            say(f"left out: {pair[1]} on {pair[0]}, {of} runs: {reasons[pair]}")
    return {key: planned for key, planned in jobs.items() if not reasons[key[0], key[2]]}


def _why_refused(planned: Job, classes: int) -> str | None:
    """Why a job's method refuses its backbone; None where it does not."""
    try:
        config = planned.config()
        config.model.pretrained, config.model.checkpoint = False, None
        method = make_method(config)
        attach(get_task(config).build_backbone(classes, keep_head=not method.trains_head), method)
    except UnsupportedModelError as error:
        return str(error)
    except Exception:  # whatever it is, the run fails with it, by itself
        pass
    return None
