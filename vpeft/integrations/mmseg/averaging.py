"""mmengine's ``EMAHook`` beside ``SaveTrained``: the averaged model is what is judged, saved, loaded and continued."""

from pathlib import Path
from typing import Any

from mmengine.hooks import EMAHook, Hook
from torch import Tensor, nn

from ...errors import CheckpointError, VpeftError
from .backbone import bare
from .trained import AVERAGE, part, put_trained, trained_tensors

UNKNOWN = ("before_save_checkpoint", "after_load_checkpoint")


class SavedAverage:
    """The running average that a Runner's ``EMAHook`` keeps; without such a hook there is none.

    Args:
        runner: mmengine's.
        saver: the hook that saves, which must come behind it.

    Raises:
        VpeftError: two such hooks, one that comes too late, or a hook that wants to write into mmengine's own checkpoints.
    """

    def __init__(self, runner: Any, saver: Hook):
        hooks = runner.hooks
        for hook in hooks:
            for name in UNKNOWN:
                if getattr(type(hook), name) not in (getattr(Hook, name), getattr(EMAHook, name)):
                    raise VpeftError(
                        f"SaveTrained writes files of its own, for which {type(hook).__name__}.{name} would never be "
                        "called; leave that hook out, or save with mmengine's CheckpointHook"
                    )
        found = [hook for hook in hooks if isinstance(hook, EMAHook)]
        if len(found) > 1:
            raise VpeftError(f"SaveTrained: {len(found)} EMAHooks, of whose averages one could be saved; keep one")
        self.hook = found[0] if found else None
        if self.hook is not None and hooks.index(self.hook) > hooks.index(saver):
            raise VpeftError("SaveTrained would save before EMAHook averages; leave EMAHook's priority at NORMAL")

    @property
    def model(self) -> nn.Module | None:
        """The averaged segmentor."""
        return None if self.hook is None else bare(self.hook.ema_model.module)

    def tensors(self) -> dict[str, Tensor]:
        """What is to be saved of it beside the model's own, by the names in a run's state."""
        return {} if self.hook is None else {f"{AVERAGE}{n}": t for n, t in trained_tensors(self.model).items()}

    def metadata(self) -> dict[str, Any] | None:
        """What else it is to be continued by."""
        if self.hook is None:
            return None
        return {"type": type(self.hook.ema_model).__name__, "steps": int(self.hook.ema_model.steps)}

    def put(self, values: dict[str, Tensor], metadata: dict[str, Any], file: Path, heads: bool = True) -> None:
        """Let it start from the tensors of a file; arguments as of ``put_trained``."""
        if self.hook is not None:
            put_trained(self.model, values, metadata, file, heads)

    def check(self, metadata: dict[str, Any], file: Path) -> None:
        """Refuse the state of a run that did not average as this one does.

        Raises:
            CheckpointError: names both.
        """
        before, now = metadata.get("average"), self.metadata()
        theirs, ours = ((d or {}).get("type", "no EMAHook") for d in (before, now))
        if theirs != ours or (before and not (isinstance(before.get("steps"), int) and before["steps"] >= 0)):
            raise CheckpointError(f"{file}: written with {theirs}, this configuration has {ours}; a run goes on as it began")

    def restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any], file: Path) -> None:
        """Go on from a run's state, which ``check`` has passed."""
        if self.hook is not None:
            put_trained(self.model, part(tensors, AVERAGE), metadata, file)
            self.hook.ema_model.steps.fill_(metadata["average"]["steps"])
