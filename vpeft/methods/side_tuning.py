"""Side-Tuning: a small network of its own beside the backbone (Zhang et al., ECCV 2020, arXiv 1912.13503)."""

import warnings
from collections.abc import Iterator

import timm
import torch
from torch import Tensor, nn

from ..attached.tree import Tree
from ..backbone.modules import IMAGE, LAST
from ..backbone.sites import Sites
from ..errors import MethodError, did_you_mean, shown
from ..interventions.base import Intervention
from ..interventions.side import SideOutput, Tap
from ..options import option
from .base import Method, Paper, register
from .pixel import as_images

WIDTHS = (64, 128, 256, 256)


class ConvNet(nn.Sequential):
    """Four stages of 3x3 convolution with stride 2, group norm and GELU; the mean over the map; a linear map."""

    def __init__(self, channels: int, out_features: int):
        stages, last = [], channels
        for width in WIDTHS:
            conv = nn.Conv2d(last, width, 3, stride=2, padding=1)
            stages.append(nn.Sequential(conv, nn.GroupNorm(8, width), nn.GELU()))
            last = width
        super().__init__(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, out_features))


def side_model(name: str, size: tuple[int, int, int], out_features: int) -> nn.Module:
    """The conv net, or a timm model of random weights whose classifier gives ``out_features`` numbers.

    Raises:
        MethodError: timm knows no model of this name.
    """
    channels, *image = size
    if name == "conv":
        return ConvNet(channels, out_features)
    if not timm.is_model(name):
        raise MethodError(f"side: timm has no model {shown(name)}{did_you_mean(name, ['conv', *timm.list_models()])}")
    options = {"num_classes": out_features, "in_chans": channels}
    try:
        return timm.create_model(name, img_size=tuple(image), **options)
    except TypeError:  # convolutional models take any size
        return timm.create_model(name, **options)


class Blend(SideOutput):
    """a y + (1 - a) S(image) with a = sigmoid(alpha) and y the backbone's pooled features."""

    def __init__(self, sites: Sites, image: Tap, method: "SideTuning"):
        super().__init__(sites.pooled, LAST, image, on_input=True)
        self.alpha = nn.Parameter(torch.full((1,), method.alpha_init))
        self.side = side_model(method.side, sites.image_size, pooled_width(sites))
        exempt = getattr(self.side, "no_weight_decay", set)()
        self.no_decay = frozenset({"alpha", *(f"side.{name}" for name in exempt)})

    def feed(self, state: Tensor, y: Tensor) -> Tensor:
        a = torch.sigmoid(self.alpha)
        images, frames = as_images(state)
        side = self.side(images).unflatten(0, (-1, frames)).mean(1)
        return a * y + (1 - a) * side.to(y.dtype).view_as(y)


def pooled_width(sites: Sites) -> int:
    """Channels of the pooled features."""
    head = sites.heads[0].module if sites.heads else None
    return getattr(head, "in_features", None) or int(sites.model.num_features)


@register(
    "side_tuning",
    Paper("Side-Tuning: A Baseline for Network Adaptation via Additive Side Networks", "ECCV 2020", "1912.13503", "side"),
    where="beside the whole model, on the image, blended with the pooled features",
)
class SideTuning(Method):
    """The classifier sees a B(image) + (1 - a) S(image): B the frozen backbone's pooled features, S a small network.

    a = sigmoid(alpha) is learned. S takes the same image and ends in a linear map to the width of the features. All of B
    can be cached. Not the bare model at the start: S is random. The released code's group norm on the blend, made for
    another kind of features, is left out. In a model of whole clips S sees single frames, and its features are averaged
    over them (ours).

    Args:
        side: S: ``conv``, four convolutions with about a million parameters, or the name of a timm model (of random
            weights; load others into ``handle.root``'s ``side_tuning.side``).
        alpha_init: 0 gives a = 1/2; 4 gives 0.98.
    """

    side: str = option("conv", free="`conv` or the name of a timm model")
    alpha_init: float = option(0.0, ge=-1000, le=1000)

    @property
    def starts_as_identity(self) -> bool:
        return False

    def build(self, sites: Sites) -> Iterator[tuple[str, Intervention]]:
        image = Tap(sites.patch_embed, IMAGE, on_input=True)
        yield "side_tuning.image", image
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            blend = Blend(sites, image, self)
        yield "side_tuning", blend

    def notes(self, tree: Tree) -> list[tuple[str, str]]:
        alpha = tree.get_parameter("side_tuning.alpha")
        return [] if alpha.is_meta else [("backbone", f"a = {torch.sigmoid(alpha).item():.3f} of the blend")]
