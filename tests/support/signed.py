"""Checkpoints edited by somebody who signs them again: the checksum fits whatever they hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, safe_open, save
from torch import Tensor

from vpeft import checkpoint


def parts(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata and the tensors of a file."""
    with safe_open(path, "pt") as f:
        return json.loads(f.metadata()[checkpoint.KEY]), load_file(path)


def sign(path: Path, metadata: Any, tensors: dict[str, Tensor]) -> Path:
    """Write these as a checkpoint whose checksum fits; ``metadata`` may be a text."""
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    path.write_bytes(save(tensors, {checkpoint.KEY: text, "sha256": checkpoint.checksum(text, tensors)}))
    return path


def edited(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> Path:
    """A copy beside the file, changed in place by ``change(metadata, tensors)`` and signed again."""
    metadata, tensors = parts(path)
    change(metadata, tensors)
    return sign(path.with_name(f"edited_{path.name}"), metadata, tensors)
