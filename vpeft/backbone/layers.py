"""Which layer of a model a tensor belongs to, as timm groups them for rates that fall from layer to layer."""

from torch import nn

from ..errors import UnsupportedModelError
from .modules import CONTAINER


def layer_numbers(model: nn.Module) -> dict[str, int]:
    """The layer of each of the model's own tensors: 0 is the patch embedding's, the largest number the classifier's.

    timm's grouping: every block is a layer, in Swin across its stages; a final norm mostly goes with the last block.

    Raises:
        UnsupportedModelError: timm groups no tensors of this model.
    """
    from timm.models import group_parameters  # of its private modules, the public name

    matcher = getattr(model, "group_matcher", None)
    if not callable(matcher):
        raise UnsupportedModelError(f"{type(model).__name__} does not say which layer a tensor belongs to (group_matcher)")
    found = group_parameters(model, matcher(coarse=False), reverse=True)
    return {name: number for name, number in found.items() if not name.startswith(f"{CONTAINER}.")}
