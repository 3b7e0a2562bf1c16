"""The folder of one run: what was asked for, what happened, and what came out."""

import json
import logging
import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ..errors import ConfigError
from ..files import write_text
from .config import from_container

PACKAGES = ("vpeft", "torch", "timm", "torchvision", "accelerate", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class RunFolder:
    """``output/name`` with config.yaml, log.jsonl, console.log, checkpoints, metrics.json, curves.png, environment.json.

    Args:
        config: the resolved configuration.
        main: False in all but the first process, which alone writes.

    Raises:
        ConfigError: the folder holds a finished run, or an unfinished one with other settings.
    """

    def __init__(self, config: DictConfig, *, main: bool = True):
        self.path = Path(config.output) / config.name
        self.main = main
        self.resuming = False
        state = self.file("state.safetensors")
        if config.overwrite:
            if main and self.path.exists():
                shutil.rmtree(self.path)
        elif self.file("metrics.json").exists():
            raise ConfigError(f"{self.path} holds a finished run; choose another name=…, or overwrite=true to replace it")
        elif state.exists():
            if config.resume != "auto":
                raise ConfigError(f"{self.path} holds an unfinished run; resume=auto continues it, overwrite=true drops it")
            self._same_settings(config)
            self.resuming = True
        if main:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.file("config.yaml"), OmegaConf.to_yaml(config, resolve=True))
            environment = {
                "versions": versions(),
                "platform": platform.platform(),
                "processor": platform.processor() or platform.machine(),
                "cpus": os.cpu_count(),
                "command": sys.argv,
            }
            write_text(self.file("environment.json"), json.dumps(environment, indent=1))
        self.logger = self._logger()

    def file(self, name: str) -> Path:
        """The path of a file in the folder."""
        return self.path / name

    def _same_settings(self, config: DictConfig) -> None:
        stored = OmegaConf.to_container(from_container(OmegaConf.to_container(OmegaConf.load(self.file("config.yaml")))))
        asked = OmegaConf.to_container(config, resolve=True)
        free = {"resume", "overwrite", "output", "wandb"}
        changed = sorted(k for k in asked if k not in free and asked[k] != stored.get(k))
        if changed:
            raise ConfigError(
                f"{self.path} holds an unfinished run with other settings in: {', '.join(changed)}; "
                "choose another name=…, or overwrite=true to drop it"
            )

    def _logger(self) -> logging.Logger:
        logger = logging.getLogger(f"vpeft.run.{self.path}")
        logger.setLevel(logging.INFO)
        logger.propagate = False
        for old in list(logger.handlers):
            logger.removeHandler(old)
        if self.main:
            from rich.logging import RichHandler

            file = logging.FileHandler(self.file("console.log"))
            file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
            logger.addHandler(file)
            logger.addHandler(RichHandler(show_path=False, show_level=False, markup=False))
        else:
            logger.addHandler(logging.NullHandler())
        return logger

    def rows(self) -> list[dict]:
        """The rows of log.jsonl so far; a line cut by a crash is left out."""
        rows = []
        if self.file("log.jsonl").exists():
            for line in self.file("log.jsonl").read_text().splitlines():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError:
                    break
        return rows

    def keep_rows(self, epochs: int) -> None:
        """Drop the rows of epochs that will be run again."""
        rows = [r for r in self.rows() if r["epoch"] < epochs]
        write_text(self.file("log.jsonl"), "".join(json.dumps(r) + "\n" for r in rows))

    def add_row(self, row: dict) -> None:
        """Append a row to log.jsonl."""
        with self.file("log.jsonl").open("a") as f:
            f.write(json.dumps(row) + "\n")

    def finish(self, metrics: dict) -> None:
        """Write metrics.json, which marks the run as finished."""
        write_text(self.file("metrics.json"), json.dumps(metrics, indent=1))
