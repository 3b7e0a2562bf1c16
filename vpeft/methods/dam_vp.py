"""DAM-VP: a frame for each cluster of images (Huang et al., CVPR 2023, arXiv 2303.08138)."""

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from ..attached.tree import Tree
from ..backbone.modules import ModuleRef
from ..backbone.sites import Sites
from ..errors import MethodError
from ..numerics import at_least_float32
from ..options import option
from .base import Paper, count, register
from .pixel import SIDES, PixelMethod, PixelPrompt, frame, frame_parts, frame_width


class ClusterFrames(PixelPrompt):
    """x + the frame of the nearest prototype: ``prototypes`` (K, D), ``up`` (K, 3, p, W) and so on.

    Args:
        sites, chosen, pad: as ``Frame``'s.
        neurons: ``map`` chooses among the classifier's inputs instead of its outputs.
    """

    no_decay = frozenset(SIDES)
    resizable = frozenset({"prototypes", *SIDES})

    def __init__(self, sites: Sites, chosen: Tensor | None, pad: int, neurons: bool):
        super().__init__(sites, chosen)
        self.model, self.neurons = ModuleRef("", sites.model), neurons
        for side, part in frame_parts(sites, pad).items():
            self.register_parameter(side, nn.Parameter(part.detach()[None]))
        self.register_buffer("prototypes", torch.zeros(1, features_width(sites)))

    @property
    def pickable(self) -> int | None:
        return self.prototypes.shape[1] if self.neurons else super().pickable

    def why_not(self, tensors: dict[str, Tensor]) -> str | None:
        prototypes = tensors["prototypes"]
        clusters, width = prototypes.shape
        if not clusters or width != self.prototypes.shape[1]:
            return f"prototypes: {clusters} of {width} numbers, where the features have {self.prototypes.shape[1]}"
        if not prototypes.is_meta and not prototypes.to(self.prototypes.dtype).isfinite().all():
            return "prototypes: not all of them are finite"
        for side in SIDES:
            wanted = (clusters, *getattr(self, side).shape[1:])
            if tensors[side].shape != wanted:
                return f"{side}: shape {tuple(tensors[side].shape)}, where {clusters} prototypes and the image need {wanted}"
        return super().why_not(tensors)

    def _pick(self, args: tuple, output: Tensor) -> Tensor | None:
        return super()._pick(args, args[0] if self.neurons else output)

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """What the classifier would read of unprompted images: (B, D), in evaluation mode."""
        model = self.model.module
        dropping = [m for m in model.modules() if m.training] if model.training else []
        try:
            for module in dropping:
                module.training = False
            with self.left_out():  # a forward of its own, inside of another one or not
                return model.forward_head(model.forward_features(x), pre_logits=True)
        finally:
            for module in dropping:
                module.training = True

    def on_frames(self, x: Tensor) -> Tensor:
        return self(x)  # a clip is one image to the clusters: its frames have the same frame around them

    def forward(self, x: Tensor) -> Tensor:
        self.check_size(x)
        features = self.features(x)
        wide, prototypes = at_least_float32(features), at_least_float32(self.prototypes)
        distances = (wide[:, None] - prototypes).square().sum(-1)
        nearest = distances.argmin(1)
        around = frame(*(getattr(self, side)[nearest] for side in SIDES))
        return x + (around if x.ndim == 4 else around.unsqueeze(2))

    @torch.no_grad()
    def spread(self, prototypes: Tensor) -> None:
        """Take other prototypes, and for each a copy of the present first frame."""
        self.prototypes = prototypes.to(self.prototypes)
        for side in SIDES:
            old = getattr(self, side)
            copies = old.detach()[:1].repeat(len(prototypes), 1, 1, 1)
            setattr(self, side, nn.Parameter(copies, requires_grad=old.requires_grad))


def features_width(sites: Sites) -> int:
    """Numbers that the classifier reads of an image."""
    return int(getattr(sites.model, "head_hidden_size", None) or sites.model.num_features)


@register(
    "dam_vp",
    Paper("Diversity-Aware Meta Visual Prompting", "CVPR 2023", "2303.08138", "prompt"),
    where="the normalised image; the classifier",
)
class DAMVP(PixelMethod):
    """Images are clustered by their features, and each cluster has a learned frame of its own.

    An image takes the frame of the nearest prototype, a cluster's mean feature. Features are what the frozen classifier
    reads of an unprompted image: **each forward runs the backbone a second time**, without gradients. Clusters come from
    ``handle.calibrate`` on training images: agglomerative, average linkage. All frames start as copies of one N(0, 1)
    frame. To start from a meta-learned one (the paper learns it on other data sets), load it before ``calibrate``:
    ``handle.load_state_dict({"dam_vp.up": …}, strict=False)``, one frame of shape (1, 3, p, W).

    Without a head of its own, the logits are the C features that vary most over 512 images of noise, in the order of
    their indices, as in the released code.

    Args:
        head: ``active`` (see above), or ``tuned``, which trains the model's classifier along.
        pad: width of the frames in pixels; None for 30 at 224 and the same share of other sizes.
        threshold: clusters are joined while their distance is below; it depends on the backbone (presets hold the paper's).
        n_clusters: K, which is then no matter of the threshold.
        samples: how many training images are clustered.
        classes: C of a model whose head is not tuned; None for as many as its classifier has outputs.
    """

    head: Literal["active", "tuned"] = "active"
    pad: int | None = count(None, "pixels")
    threshold: float = option(31.0, gt=0)
    n_clusters: int | None = count(None, "clusters")
    samples: int = option(1000, ge=1, unit="images")
    classes: int | None = count(None, "classes")

    presets = {
        "vit_b_1k": {"threshold": 31.0},
        "vit_b_22k": {"threshold": 10.0},
        "swin_b_22k": {"threshold": 20.0},
        "moco_v3_b": {"threshold": 18.0},
    }

    @property
    def trains_head(self) -> bool:
        return self.head == "tuned"

    @property
    def reads_classifier(self) -> bool:
        return self.head == "tuned"

    def follow_classifier(self, tree: Tree, heads: list[ModuleRef]) -> None:
        """See ``PixelMethod``; the classes are features, of which there must be enough."""
        width = features_width(tree.sites)
        if self.head == "active" and tree.model.num_classes > width:
            raise MethodError(f"{self.name}: {tree.model.num_classes} classes, but only {width} features to stand for them")
        super().follow_classifier(tree, heads)

    def check(self) -> None:
        super().check()
        if self.head == "tuned" and self.classes is not None:
            raise MethodError(f"{self.name}.classes: with head='tuned' the model's own classifier has them; leave it out")

    def build(self, sites: Sites) -> Iterator[tuple[str, ClusterFrames]]:
        chosen = None
        if self.head == "active":
            self.target_classes(sites, features_width(sites))
            chosen = torch.arange(self.classes or sites.model.num_classes)
        yield "dam_vp", ClusterFrames(sites, chosen, frame_width(self, sites), neurons=self.head == "active")

    def looks_calibrated(self, tree: Tree) -> bool:
        """The one prototype of the start is 0, which no image's features are."""
        return tree.get_submodule("dam_vp").prototypes.is_meta or bool(tree.get_submodule("dam_vp").prototypes.any())

    def calibrate(self, tree: Tree, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        tree.objective.need_classifier(self.name)
        tree.model.eval()
        prompt = tree.get_submodule("dam_vp")
        found: list[Tensor] = []
        for images, _ in batches:
            found.append(prompt.features(images))
            if sum(map(len, found)) >= self.samples:
                break
        features = torch.cat(found)[: self.samples]
        cluster = self.clusters(features.double().cpu()).to(features.device)
        prompt.spread(torch.stack([features[cluster == k].mean(0) for k in range(int(cluster.max()) + 1)]))
        if self.head == "active":
            prompt.map.copy_(self.active_neurons(prompt, len(prompt.map), images))

    def clusters(self, features: Tensor) -> Tensor:
        """The cluster 0 … K-1 of each image."""
        from sklearn.cluster import AgglomerativeClustering

        if (self.n_clusters or 1) > len(features):
            raise MethodError(f"{self.name}.n_clusters: {self.n_clusters} clusters of {len(features)} images")
        if len(features) == 1:
            return torch.zeros(1, dtype=torch.long)
        threshold = None if self.n_clusters else self.threshold
        how = AgglomerativeClustering(self.n_clusters, distance_threshold=threshold, linkage="average")
        return torch.from_numpy(how.fit_predict(features.numpy()))

    def active_neurons(self, prompt: ClusterFrames, count: int, like: Tensor) -> Tensor:
        """The features with the largest standard deviation over images of noise, sorted by index."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(512, *like.shape[1:], generator=generator)
        features = torch.cat([prompt.features(part.to(like)) for part in noise.split(64)])
        order = features.float().std(0, unbiased=False).argsort(descending=True, stable=True)
        return order[:count].sort().values
