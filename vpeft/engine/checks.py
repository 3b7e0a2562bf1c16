"""What cannot work in a run of the engine, whatever its task: refused before any model is built or folder made."""

from omegaconf import DictConfig

from ..data.splits import Datasets
from ..errors import ConfigError


def check_data(config: DictConfig, data: Datasets) -> None:
    """Refuse, once the data are open, what needs a validation split where there is none.

    Raises:
        ConfigError: names the key.
    """
    if config.train.patience is not None and data.val is None:
        raise ConfigError("train.patience: stops by the validation metric; give data.val_split or data.val_size")
