"""Text embeddings of class names: read from a file, written to one, or computed by open_clip."""

import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import CheckpointError, ConfigError, DataError
from ...files import parse_json, read_tensors, write_tensors

TENSOR, NAMES = "text", "class_names"

# The sentences of ViLD (Gu et al., ICLR 2022, arXiv 2104.13921), over which CLIP's embeddings are averaged.
# Full stops as in SAN's released list: they change the embeddings.
_SIZES = ("small", "medium", "large")
TEMPLATES = (
    *(f"{start}{{}}{end}" for start, end in (
        ("This is a photo of a ", ""), ("There is a ", " in the scene"), ("There is the ", " in the scene"),
        ("a photo of a ", " in the scene"), ("a photo of a ", "."),
    )),
    *(f"a photo of a {size} {{}}." for size in _SIZES),
    *(f"This is a photo of a {size} {{}}." for size in _SIZES),
    *(f"There is a {size} {{}} in the scene." for size in _SIZES),
)  # fmt: skip


def read_text(path: str | Path) -> tuple[Tensor, list[str]]:
    """Text embeddings (C, d) and the C class names of a safetensors file that ``save_text`` wrote.

    Raises:
        DataError: missing, damaged, or without embeddings or names.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file of text embeddings")
    try:
        metadata, found = read_tensors(path)
        names, text = parse_json(metadata.get(NAMES, "[]"), path), found.get(TENSOR)
    except CheckpointError as error:
        raise DataError(f"{path}: no readable safetensors file with text embeddings ({error})") from error
    if text is None or text.ndim != 2 or not text.is_floating_point():
        raise DataError(f"{path}: expected a tensor '{TENSOR}' (classes, width); it has {', '.join(found) or 'no tensors'}")
    if not isinstance(names, list) or len(names) != len(text):
        raise DataError(
            f"{path}: {len(text)} text embeddings, but its metadata '{NAMES}' (a JSON list) has {len(names)} names"
        )
    return text, [str(name) for name in names]


def text_of_classes(path: str | Path, classes: Sequence[str]) -> Tensor:
    """The text embeddings (C, d) of these classes, in their order, from a file that may have another.

    Raises:
        DataError: see ``read_text``; or names that are not exactly those of the classes.
    """
    text, names = read_text(path)
    if len(text) != len(classes):
        raise DataError(f"{path}: {len(text)} text embeddings for {len(classes)} classes of the data")
    if all(name.isdecimal() for name in classes) and list(classes) != names:
        raise DataError(f"{path}: rows belong to the classes by their names, and the data have none: give data.classes")
    missing, unknown = ([n for n in a if n not in b] for a, b in ((classes, names), (names, classes)))
    twice = [n for n in names if names.count(n) > 1]
    if missing or unknown or twice:
        what = {"lacks": missing, "has unknown": unknown, "has twice": [*dict.fromkeys(twice)]}
        parts = [f"{k} {', '.join(v[:3])}{' …' if len(v) > 3 else ''}" for k, v in what.items() if v]
        raise DataError(f"{path}: rows belong to the classes by their names: it {'; '.join(parts)}")
    return text[[names.index(name) for name in classes]]


def checksum(text: Tensor) -> str:
    """Of text embeddings, as a checkpoint keeps it."""
    return hashlib.sha256(text.detach().float().contiguous().numpy().tobytes()).hexdigest()


def save_text(path: str | Path, text: Tensor, names: Sequence[str]) -> None:
    """Write text embeddings (C, d) with their class names.

    Raises:
        DataError: not as many names as embeddings.
    """
    if len(names) != len(text):
        raise DataError(f"{len(text)} text embeddings for {len(names)} class names")
    write_tensors(path, {TENSOR: text}, {NAMES: json.dumps(list(names))})


@torch.no_grad()
def clip_text(
    names: Sequence[str],
    model: str = "ViT-B-16-quickgelu",
    pretrained: str = "openai",
    templates: Iterable[str] = TEMPLATES,
) -> Tensor:
    """Normalised text embeddings (C, d) of class names: CLIP's text tower over every template, averaged.

    Needs ``pip install open_clip_torch``, which downloads the weights. OpenAI's weights were trained with QuickGELU, which
    open_clip's plain names do not have. An image backbone beside them needs it too: in timm that is
    ``vit_base_patch16_clip_quickgelu_224.openai``; ``vit_base_patch16_clip_224.openai`` holds the same weights under GELU.

    Args:
        names: of the classes.
        model: open_clip's name of the model.
        pretrained: open_clip's tag of its weights.
        templates: sentences with ``{}`` for the name.

    Raises:
        ConfigError: open_clip is not installed, there are no names, or the model has not the activation that the weights
            were trained with.
    """
    if not names:
        raise ConfigError("clip_text: no class names were given")
    if pretrained == "openai" and not model.endswith("-quickgelu"):
        raise ConfigError(f"clip_text: OpenAI's weights were trained with QuickGELU: give model='{model}-quickgelu'")
    try:
        import open_clip
    except ImportError as error:
        raise ConfigError(
            "text embeddings are computed by open_clip: pip install open_clip_torch, or read them from a file (read_text)"
        ) from error
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="QuickGELU mismatch")
        try:
            clip = open_clip.create_model(model, pretrained=pretrained).eval()
        except UserWarning as error:
            raise ConfigError(f"clip_text: {model} with {pretrained}: {error}") from error
    tokenizer = open_clip.get_tokenizer(model)
    sums = [F.normalize(clip.encode_text(tokenizer([t.format(n) for n in names])), dim=-1) for t in templates]
    return F.normalize(torch.stack(sums).mean(0), dim=-1)
