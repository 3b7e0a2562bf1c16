"""Which of several runs are to be trained anew, before the first of them trains: for tables and suites."""

import copy
from collections.abc import Sequence

from omegaconf import DictConfig

from ..errors import ConfigError
from .plan import look, place
from .run import settle
from .settings import differences, harmful, said, stored_config


def to_replace(configs: Sequence[DictConfig], what: str = "") -> set[str]:
    """Names of runs that are to be trained anew (``overwrite=true``), since their settings are others.

    Of all others ``overwrite`` becomes False: finished ones stay, and interrupted ones go on.

    Args:
        configs: of the runs.
        what: of which the runs are, before an error's sentence.

    Raises:
        ConfigError: finished runs with other settings than those that are asked for, or runs that cannot go on.
    """
    again, other = set(), []
    for config in configs:
        path = place(config)
        settle(path)
        if not (path / "metrics.json").exists():
            again |= _unfinished(config)
            continue
        changes = harmful(differences(stored_config(path), config), finished=True, config=config)
        if changes and config.overwrite:
            again.add(config.name)
        elif changes:
            other.append(f"{path} ({said(changes)})")
    if other:
        raise ConfigError(
            f"{what}finished runs have other settings than those asked for: {'; '.join(other)}; give these another name=… "
            "or output=…, or overwrite=true to train them anew"
        )
    for config in configs:
        config.overwrite = config.overwrite and config.name in again
    return again


def _unfinished(config: DictConfig) -> set[str]:
    """The name of a run that is replaced since it cannot go on with these settings."""
    plain = copy.deepcopy(config)
    plain.overwrite = False
    try:
        look(plain)
    except ConfigError:
        if not config.overwrite:
            raise
        look(copy.deepcopy(config))
        return {config.name}
    return set()
