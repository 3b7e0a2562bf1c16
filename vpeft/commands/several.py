"""What stands behind an option with several values, such as ``--seeds 0 1 train.epochs=5``: numbers, and settings."""

from collections.abc import Sequence


def settings(*options: Sequence[str] | None) -> list[str]:
    """The settings (``key.sub=value``) among the values of options, which argparse takes for more values."""
    return [v for values in options for v in values or () if "=" in v]


def numbers(option: str, values: Sequence[str]) -> list[int]:
    """The numbers among an option's values.

    Raises:
        ConfigError: a value that is neither a number nor a setting.
    """
    from ..errors import ConfigError

    wrong = [v for v in values if "=" not in v and not v.isdecimal()]
    if wrong:
        raise ConfigError(f"{option}: '{wrong[0]}' is no number; give such as {option} 0 1 2")
    return [int(v) for v in values if "=" not in v]
