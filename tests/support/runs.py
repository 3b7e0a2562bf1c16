"""Runs of the engine that are cut off, and the tiny model that most of them train."""

import pytest
from omegaconf import DictConfig

from vpeft.engine.loop import Trainer
from vpeft.engine.train import train

TINY_MODEL = """
report: none
model:
  name: vit_tiny_patch16_224
  pretrained: false
  img_size: 16
  kwargs: {patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2}
"""


def interrupted(config: DictConfig, epochs: int = 1, match: str | None = None) -> None:
    """Train until so many epochs are done; then somebody presses Ctrl-C, and the message must match."""
    real = Trainer._epoch

    def stop(self: Trainer) -> None:
        if self.epoch == epochs:
            raise KeyboardInterrupt
        real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_epoch", stop)
        with pytest.raises(KeyboardInterrupt, match=match):
            train(config)
