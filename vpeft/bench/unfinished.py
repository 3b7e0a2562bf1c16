"""The rows of a table that are measured already, so that an interruption loses none of them."""

import json
import platform
import sys
from contextlib import suppress
from pathlib import Path

import timm
import torch
from omegaconf import DictConfig, OmegaConf

from ..files import with_ending, write_text
from ..version import __version__
from .report import as_csv, from_csv
from .result import Result

_OF_THE_RUN = ("name", "output", "budget_minutes")  # settings on which no number depends


class Unfinished:
    """``OUTPUT/NAME.unfinished.csv``, a table as it grows, and ``NAME.unfinished.json``: what it is of.

    An earlier table of this name stays as it is until the new one is written.

    Attributes:
        rows: that an interrupted measurement of the same settings, versions and machine has left.
    """

    def __init__(self, config: DictConfig):
        out = Path(config.output) / config.name
        self.table, self.mark = with_ending(out, ".unfinished.csv"), with_ending(out, ".unfinished.json")
        setting = json.dumps(setting_of(config), indent=1, sort_keys=True)
        self.rows: list[Result] = []
        if self.mark.is_file() and self.mark.read_text() == setting:
            with suppress(KeyError, TypeError, ValueError):  # of another edition of this version: measured anew
                self.rows = [r for r in from_csv(self.table.read_text()) if not of_budget(r)] if self.table.is_file() else []
            if self.rows:
                print(f"goes on after {len(self.rows)} rows; to begin again, delete {self.mark}", file=sys.stderr)
            return
        self.table.unlink(missing_ok=True)  # before the mark, which says that it is of this setting
        write_text(self.mark, setting)

    def write(self, rows: list[Result]) -> None:
        """The rows so far."""
        write_text(self.table, as_csv(rows))

    def finish(self) -> None:
        """The table is whole."""
        self.mark.unlink(missing_ok=True)
        self.table.unlink(missing_ok=True)


def of_budget(row: Result) -> bool:
    """Whether the budget of time has left a row out, which another start measures."""
    return row.left_out.startswith("the budget")


def setting_of(config: DictConfig) -> dict:
    """On what the numbers of a table depend."""
    values = OmegaConf.to_container(config)
    return {"config": {k: v for k, v in values.items() if k not in _OF_THE_RUN}, **machine_of(config)}


def machine_of(config: DictConfig) -> dict[str, str | int]:
    """Processor, or GPU, threads and versions."""
    cuda = torch.device(config.device).type == "cuda"
    return {
        "processor": torch.cuda.get_device_name(torch.device(config.device)) if cuda else processor(),
        "threads": config.threads or torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "timm": timm.__version__, "vpeft": __version__},
    }


def processor() -> str:
    """Its name, as the system tells it."""
    table = Path("/proc/cpuinfo")
    if table.is_file():
        for line in table.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()
