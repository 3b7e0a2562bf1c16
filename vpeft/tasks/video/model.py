"""timm models on clips: an image model on single frames, or a ViT whose tokens are tubelets of the whole clip.

* ``FramewiseModel``: (B, 3, T, H, W) as B T images through a ViT or a Swin, pooled over time at the end. It sees motion
  only through methods that act along time.
* ``joint_vit``: VideoMAE's ViT (Tong et al., NeurIPS 2022, arXiv 2203.12602), as AdaptFormer adapts it: all tubelets of a
  clip attend to each other. It is a timm VisionTransformer with another patch embedding, so that every method that takes
  a ViT's tokens attaches to it as to any other. ``load_videomae`` reads public checkpoints, ``inflate`` starts it from
  an image ViT.

Video Swin is not here. timm's ``WindowAttention`` has a 2-D bias table and index, its ``SwinTransformerBlock`` pads,
shifts, masks and partitions in two dimensions inside its forward, and its merging and features are fixed to (B, H, W, C).
All of these would have to be written anew in three dimensions, which leaves no part of timm's Swin but the MLP, and no
structure that ``vpeft.attach`` knows.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ...errors import CheckpointError, UnsupportedModelError, VpeftError
from ...files import read_tensors
from ...interventions.base import Intervention
from ...interventions.lookup import running
from ...numerics import why_not_copied


class FramewiseModel(nn.Module):
    """An image model on the frames of clips, pooled over time in front of the model's own classifier.

    Args:
        backbone: a timm ViT or Swin. Methods attach to it, before or after it comes here; they learn T in each forward.
        pool: ``after`` the final norm, the mean over time of each frame's pooled features (AIM, and any image method);
            ``before`` it, the mean of each frame's class token (average of patches), then the norm (ST-Adapter).
        dropout: in front of the classifier, one mask per clip.

    Raises:
        UnsupportedModelError: not one classifier, or a pooling that ``before`` cannot restate.
    """

    def __init__(self, backbone: nn.Module, pool: Literal["after", "before"] = "after", dropout: float = 0.0):
        super().__init__()
        if pool not in ("after", "before"):
            raise VpeftError(f"pool: '{pool}' is neither 'after' nor 'before'")
        if not 0 <= dropout < 1:
            raise VpeftError(f"dropout: {dropout} is no probability in [0, 1)")
        if not isinstance(backbone.get_classifier(), nn.Module):
            raise UnsupportedModelError(f"{type(backbone).__name__} has several classifiers; frames are pooled for one")
        if pool == "before" and getattr(backbone, "global_pool", None) not in ("token", "avg"):
            raise UnsupportedModelError("pool='before' needs a class token or an average of patches to pool")
        self.backbone, self.pool, self.dropout = backbone, pool, dropout

    def forward(self, clip: Tensor) -> Tensor:
        """Logits (B, classes) of clips (B, 3, T, H, W)."""
        if clip.ndim != 5:
            raise VpeftError(f"expected clips (B, 3, T, H, W), got {tuple(clip.shape)}")
        frames = clip.shape[2]
        with running(self.backbone, frames=frames):
            if self.pool == "before":
                return self.backbone.get_classifier()(self._drop(self._before(clip), 1))
            features = self.backbone.forward_features(rearrange(clip, "b c t h w -> (b t) c h w"))
            features = self._drop(self.backbone.forward_head(features, pre_logits=True), frames)
            # The mean over time commutes with a linear classifier, and methods that widen its input see every frame.
            logits = self.backbone.get_classifier()(features)
        return logits.unflatten(0, (-1, frames)).mean(1)

    def _drop(self, features: Tensor, frames: int) -> Tensor:
        if not (self.training and self.dropout):
            return features
        mask = F.dropout(features.new_ones(features.shape[0] // frames, features.shape[-1]), self.dropout)
        return features * mask.repeat_interleave(frames, 0)

    def _before(self, clip: Tensor) -> Tensor:
        backbone = self.backbone
        for part in backbone.modules():
            if isinstance(part, Intervention) and part.needs_unpooled and part.enabled:
                raise UnsupportedModelError(
                    f"pool='before': an attached method ({type(part).__name__}) needs the features of every frame behind "
                    "the final norm; use pool='after'"
                )
        rows = rearrange(clip, "b c t h w -> (b t) c h w")
        prefix = getattr(backbone, "num_prefix_tokens", 0)
        options: dict[str, Any] = {"return_prefix_tokens": True} if prefix else {}
        last = backbone.forward_intermediates(rows, indices=1, norm=False, intermediates_only=True, **options)[0]
        maps, tokens = last if prefix else (last, None)
        x = tokens[:, 0] if backbone.global_pool == "token" else maps.mean((2, 3))
        x = backbone.norm(x.unflatten(0, (clip.shape[0], -1)).mean(1))
        if not isinstance(backbone, VisionTransformer):
            return backbone.forward_head(x[:, None, None], pre_logits=True)
        skipped = prefix if backbone.global_pool == "avg" else 0  # what its pooling leaves out
        return backbone.forward_head(F.pad(x[:, None], (0, 0, skipped, 0)), pre_logits=True)


class TubeletEmbed(nn.Module):
    """Clips (B, 3, T, H, W) to tokens (B, T/k H/p W/p, D) in the order (t, h, w), with timm's PatchEmbed's interface.

    As a map (``dynamic_feat_size``), for methods with 2-D convolutions, the frames of tubelets stand below each other.

    Args:
        frames: T.
        tubelet: k, frames of one token.
        img_size, patch_size, in_chans, embed_dim, bias: as in timm.
        **factory: ``device`` and ``dtype``.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        *,
        frames: int = 16,
        tubelet: int = 2,
        **factory: Any,
    ):
        super().__init__()
        if frames < 1 or tubelet < 1 or frames % tubelet:
            raise VpeftError(f"frames: {frames} frames are not cut into tubelets of {tubelet}")
        self.img_size, self.patch_size = (
            tuple(s) if isinstance(s, list | tuple) else (s, s) for s in (img_size, patch_size)
        )
        if any(s % p for s, p in zip(self.img_size, self.patch_size, strict=True)):
            raise VpeftError(f"img_size: {self.img_size} is not cut into patches of {self.patch_size}")
        factory.pop("dynamic_img_pad", None)  # which timm always gives; clips are never padded
        self.frames, self.tubelet = frames, tubelet
        self.grid_size = tuple(s // p for s, p in zip(self.img_size, self.patch_size, strict=True))
        self.num_patches = frames // tubelet * self.grid_size[0] * self.grid_size[1]
        kernel = (tubelet, *self.patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel, stride=kernel, bias=bias, **factory)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        height, width = (s // p for s, p in zip(img_size, self.patch_size, strict=True))
        return self.frames // self.tubelet * height, width

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[2:]) != (self.frames, *self.img_size):
            raise VpeftError(
                f"expected clips (B, 3, {self.frames}, {self.img_size[0]}, {self.img_size[1]}), got {tuple(x.shape)}"
            )
        return rearrange(self.proj(x), "b d t h w -> b (t h w) d")


def sinusoid(positions: int, width: int) -> Tensor:
    """VideoMAE's table (positions, width): angle pos / 10000^(2 floor(j/2) / width), sine on even j, cosine on odd."""
    j = torch.arange(width)
    angle = torch.arange(positions)[:, None] / 10000.0 ** (2 * (j // 2) / width).double()
    return torch.where(j % 2 == 0, angle.sin(), angle.cos()).float()


def joint_vit(name: str = "vit_base_patch16_224", *, frames: int = 16, tubelet: int = 2, **kwargs: Any) -> VisionTransformer:
    """A joint space-time ViT on clips (B, 3, frames, H, W): tubelets, fixed sinusoid positions, mean, ``fc_norm``, head.

    Args:
        name: a plain timm ViT, for its sizes; without weights (see ``load_videomae`` and ``inflate``).
        frames: T of a clip.
        tubelet: frames of one token.
        **kwargs: ``num_classes``, ``img_size``, ``drop_path_rate`` … as for ``timm.create_model``.

    Raises:
        UnsupportedModelError: no plain timm ViT of this name.
        VpeftError: sizes that do not divide.
    """
    embed: Callable = partial(TubeletEmbed, frames=frames, tubelet=tubelet)
    fixed = {"class_token": False, "global_pool": "avg", "reg_tokens": 0, "embed_layer": embed}
    if "pretrained" in kwargs:
        raise VpeftError("pretrained: image weights do not fit tubelets; use load_videomae, or inflate from an image ViT")
    try:
        model = timm.create_model(name, **(kwargs | fixed))
    except (TypeError, RuntimeError) as error:
        raise UnsupportedModelError(f"{name} cannot be built as a joint space-time ViT: {error}") from error
    if type(model) is not VisionTransformer or getattr(model, "pos_embed", None) is None:
        raise UnsupportedModelError(f"{name} is a {type(model).__name__} without the parts of a plain ViT")
    set_positions(model, sinusoid(model.patch_embed.num_patches, model.embed_dim))
    return model


def set_positions(model: VisionTransformer, table: Tensor) -> None:
    """Give a joint ViT fixed positions (tokens, D): a buffer, so that nothing trains them, saved with the model."""
    like = model.patch_embed.proj.weight
    del model.pos_embed
    model.register_buffer("pos_embed", table[None].to(like.device, like.dtype))


@torch.no_grad()
def inflate(
    model: VisionTransformer,
    image_model: nn.Module,
    *,
    kernel: Literal["mean", "centre"] = "mean",
    positions: Literal["image", "sinusoid"] = "image",
) -> VisionTransformer:
    """Start a joint ViT from an image ViT of the same sizes: blocks, final norm (as ``fc_norm``) and patch kernel.

    The class and register tokens are left behind, with their positions: the joint model averages its patches, so the
    image's final norm, made for the class token where that was pooled, reads their mean instead.

    Args:
        model: from ``joint_vit``; it is changed and returned. Its head stays.
        image_model: a plain timm ViT.
        kernel: the patch kernel in time: the image's divided over the tubelet's frames, or in its middle one. Either
            way, a clip of equal frames gives the image's patches.
        positions: the image's own in every frame, plus VideoMAE's table at each frame's first token, as large as they are
            (a sinusoid over the frames' numbers would hardly tell one frame from the next); or VideoMAE's table.

    Raises:
        UnsupportedModelError: the image model is no plain ViT.
        CheckpointError: blocks or patches of other sizes or parts.
    """
    if not isinstance(image_model, VisionTransformer) or getattr(image_model, "pos_embed", None) is None:
        raise UnsupportedModelError(f"a {type(image_model).__name__} is no plain ViT, from which a joint one could start")
    source = image_model.state_dict()
    embed = model.patch_embed
    target = model.state_dict()
    values = {n: t for n, t in source.items() if n.startswith(("blocks.", "norm_pre."))}
    for n in ("weight", "bias"):
        values |= {f"fc_norm.{n}": source[k] for k in (f"norm.{n}", f"fc_norm.{n}") if k in source}
    values["patch_embed.proj.weight"] = _kernel_in_time(source["patch_embed.proj.weight"], embed, kernel)
    if "patch_embed.proj.bias" in source:
        values["patch_embed.proj.bias"] = source["patch_embed.proj.bias"]
    if positions == "image":
        patches = embed.grid_size[0] * embed.grid_size[1]
        if tuple(image_model.patch_embed.grid_size) != embed.grid_size:
            raise CheckpointError(
                f"pos_embed: positions of {image_model.patch_embed.grid_size} patches do not fit frames of "
                f"{embed.grid_size}; build the image model with img_size={embed.img_size}"
            )
        image = source["pos_embed"][0, -patches:]
        time = sinusoid(embed.num_patches, model.embed_dim)[::patches].to(image) * image.std() * 2**0.5
        values["pos_embed"] = rearrange(time[:, None] + image, "t n d -> 1 (t n) d")
    _fill(model, values, needed=[n for n in target if not n.startswith(("head.", "pos_embed"))], origin="the image model")
    return model


def _kernel_in_time(weight: Tensor, embed: TubeletEmbed, kernel: str) -> Tensor:
    """A patch kernel (D, C, h, w) over a tubelet's frames: divided over all of them, or in the middle one alone."""
    own = embed.proj.weight
    if weight.shape != (*own.shape[:2], *own.shape[3:]):
        raise CheckpointError(
            f"patch_embed: shape {tuple(weight.shape)} of the image model's does not fit {tuple(own.shape)}"
        )
    if kernel == "mean":
        return repeat(weight, "d c h w -> d c k h w", k=embed.tubelet) / embed.tubelet
    found = weight.new_zeros(*weight.shape[:2], embed.tubelet, *weight.shape[2:])
    found[:, :, embed.tubelet // 2] = weight
    return found


def load_videomae(model: VisionTransformer, path: str | Path) -> list[str]:
    """Put the weights of a public VideoMAE checkpoint (pre-trained or fine-tuned) into a joint ViT.

    The separate biases of queries and values become timm's one, with zeros for the keys. Of a pre-trained file the
    encoder is taken (its last norm is not: there is none in front of the mean); a head of other classes is left out.
    Files of Hugging Face's transformers are read too, and names below a wrapper's such as ``module.``.

    Args:
        model: from ``joint_vit``.
        path: of the file, safetensors or a pickle, which is read with ``weights_only``.

    Returns:
        The names of the model's tensors that the file does not hold, which stay as they were.

    Raises:
        CheckpointError: missing, no plain tensors, or of another model; then nothing was changed.
    """
    tensors = _from_hugging_face(_unwrapped(Path(path)), path)
    if any(n.startswith("encoder.") for n in tensors):
        tensors = {n.removeprefix("encoder."): t for n, t in tensors.items() if n.startswith("encoder.")}
        tensors = {n: t for n, t in tensors.items() if not n.startswith(("norm.", "head."))}
    values = {n: t for n, t in tensors.items() if not n.endswith((".q_bias", ".v_bias")) and n != "pos_embed"}
    for n, q in tensors.items():
        if n.endswith(".q_bias"):
            attention = n.removesuffix(".q_bias")
            v = tensors.get(f"{attention}.v_bias")
            if v is None:
                raise CheckpointError(f"{path}: {n} without {attention}.v_bias")
            values[f"{attention}.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    own = model.state_dict()
    if any(own[n].shape != values[n].shape for n in ("head.weight", "head.bias") if n in own and n in values) or (
        "head.weight" not in own
    ):
        values = {n: t for n, t in values.items() if not n.startswith("head.")}
    needed = [n for n in own if n.startswith(("blocks.", "patch_embed."))]
    _fill(model, values, needed, origin=str(path))
    return sorted(own.keys() - values.keys() - {"pos_embed"})


# Parts of names in transformers' VideoMAE, and timm's, in the order in which they are looked for.
_HUGGING_FACE = {
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.", "encoder.layer.": "blocks.",
    ".attention.output.dense.": ".attn.proj.", ".intermediate.dense.": ".mlp.fc1.", ".output.dense.": ".mlp.fc2.",
    ".layernorm_before.": ".norm1.", ".layernorm_after.": ".norm2.", "classifier.": "head.",
}  # fmt: skip
# What a joint ViT has no use for: the decoder of pre-training, a last norm, fixed positions.
_LEFT_BEHIND = ("decoder.", "encoder_to_decoder.", "mask_token", "layernorm.", "position_embeddings", "embeddings.position")


def _from_hugging_face(tensors: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Tensors under timm's names where they have those of transformers; else as they are."""
    if not any("encoder.layer." in n for n in tensors):
        return tensors
    found, separate = {}, {}
    for n, t in tensors.items():
        name = n.removeprefix("videomae.")
        if name.startswith(_LEFT_BEHIND):
            continue
        for theirs, ours in _HUGGING_FACE.items():
            name = name.replace(theirs, ours)
        (separate if ".attention.attention." in name else found)[name] = t
    for block in {n.partition(".attention.attention.")[0] for n in separate}:
        own = {n.rpartition(".attention.attention.")[2]: t for n, t in separate.items() if n.startswith(f"{block}.")}
        missing = [k for k in ("query.weight", "key.weight", "value.weight") if k not in own]
        if missing:
            raise CheckpointError(f"{path}: names as of Hugging Face's VideoMAE, but {block} has no {missing[0]}")
        found[f"{block}.attn.qkv.weight"] = torch.cat([own[f"{k}.weight"] for k in ("query", "key", "value")])
        q, v = (own.get(f"{k[0]}_bias", own.get(f"{k}.bias")) for k in ("query", "value"))
        if q is not None and v is not None:
            found[f"{block}.attn.qkv.bias"] = torch.cat([q, own.get("key.bias", torch.zeros_like(q)), v])
    return found


def _unwrapped(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    found = read_tensors(path)[1] if path.suffix == ".safetensors" else _unpickled(path)
    for prefix in ("module.", "_orig_mod.", "model.", "backbone."):
        if all(n.startswith(prefix) for n in found):
            found = {n.removeprefix(prefix): t for n, t in found.items()}
    return found


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise CheckpointError(
            f"{path} cannot be read as plain tensors (weights_only): {str(error).splitlines()[0]}; save its 'model' or "
            "'module' entry alone"
        ) from error
    for _ in range(2):
        for key in ("module", "model", "state_dict"):
            if isinstance(found, dict) and isinstance(found.get(key), dict):
                found = found[key]
    if not isinstance(found, dict) or not found or not all(isinstance(t, Tensor) for t in found.values()):
        raise CheckpointError(f"{path} holds no state dict, neither plain nor under 'module' or 'model'")
    return found


@torch.no_grad()
def _fill(model: nn.Module, values: dict[str, Tensor], needed: list[str], origin: str) -> None:
    """Copy values in by name; nothing is changed where one is unknown, missing or of another shape."""
    own = model.state_dict()
    missing, unknown = sorted(set(needed) - values.keys()), sorted(values.keys() - own.keys())
    for what, names in (("does not hold", missing), ("holds, but the model has no", unknown)):
        if names:
            raise CheckpointError(f"{origin} {what} {', '.join(names[:3])}{' …' if len(names) > 3 else ''}")
    for n, t in values.items():
        if problem := why_not_copied(t, own[n]):
            raise CheckpointError(f"{origin}: {n}: {problem}")
    for n, t in values.items():
        own[n].copy_(t)
