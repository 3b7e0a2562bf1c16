"""The whole model as one program: ``torch.export``, or ONNX through torch's exporter of that name."""

import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedModelError
from .source import Exportable

KEY = "vpeft"  # of the description, in the file
INPUT, OUTPUT = "input", "output"
LARGEST_ONNX = 2**31 - 2**20  # bytes in one file of ONNX's format
Run = Callable[[Tensor], Tensor]


def need_onnx() -> None:
    """Refuse to begin without the packages that write and run ONNX.

    Raises:
        ConfigError: names the pip command.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"--format onnx needs {name} ({error}); pip install 'vpeft[export]'") from error


def write_torch(source: Exportable, file: Path) -> None:
    """Write a program of ``torch.export`` for any number of inputs; the description is one of its extra files."""
    with _quiet(), torch.no_grad():
        program = _exported(source)
        stream = io.BytesIO()  # torch reports a full disk by an error of its own, in many lines
        torch.export.save(program, stream, extra_files={f"{KEY}.json": json.dumps(source.describe())})
        file.write_bytes(stream.getbuffer())


def run_torch(file: Path) -> Run:
    """The program in a file that this process has written: such files can hold pickles, so no other one is opened."""
    with _quiet(), file.open("rb") as stream:
        return torch.export.load(stream).module()


def _exported(source: Exportable) -> Any:
    # Not under one image: torch would take a size of 1 for a constant.
    batch = torch.export.Dim("batch", min=1)
    try:
        return torch.export.export(source.leaving.module, (source.inputs(2),), dynamic_shapes=({0: batch},))
    except Exception as error:  # of whatever kind, and of many lines
        raise UnsupportedModelError(f"torch.export does not take this model: {_first(error)}") from error


def write_onnx(source: Exportable, file: Path) -> None:
    """Write one ONNX file for any number of inputs; the description is in its ``metadata_props``.

    Raises:
        UnsupportedModelError: too large for one file, or in bfloat16.
    """
    if any(t.dtype == torch.bfloat16 for t in _tensors(source.leaving.module)):
        raise UnsupportedModelError(
            "onnxruntime has no bfloat16 for convolutions on the CPU; call model.float() or model.half() first, or choose "
            "the format torch"
        )
    size = sum(t.numel() * t.element_size() for t in _tensors(source.leaving.module))
    if size > LARGEST_ONNX:
        gib = f"{size / 2**30:.1f} GiB"
        raise UnsupportedModelError(f"the model has {gib}, and one ONNX file at most 2; choose the format torch")
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                source.leaving.module, (source.inputs(2),), dynamo=True, dynamic_shapes=shapes, input_names=[INPUT],
                output_names=[OUTPUT], verbose=False, optimize=True,
            )  # fmt: skip
        except Exception as error:  # of whatever kind, and of many lines
            raise UnsupportedModelError(f"torch.onnx does not take this model: {_first(error)}") from error
        described = source.describe()
        program.model.metadata_props[KEY] = json.dumps(described)
        program.model.metadata_props["class_names"] = json.dumps(described["class_names"])
        program.save(str(file), external_data=False)


def run_onnx(file: Path) -> Run:
    """What onnxruntime makes of a file, on the CPU.

    Raises:
        UnsupportedModelError: it does not run it.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's have no common class
        raise UnsupportedModelError(
            f"onnxruntime does not run this model on the CPU, so that it cannot be compared: {_first(error)}"
        ) from error
    return lambda x: torch.from_numpy(session.run(None, {INPUT: x.numpy()})[0])


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:500]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say about themselves."""
    loggers = [(log, log.level) for log in map(logging.getLogger, ("onnxscript", "onnx_ir", "torch.onnx", "torch.export"))]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for log, _ in loggers:
                log.setLevel(logging.ERROR)
            yield
    finally:
        for log, level in loggers:
            log.setLevel(level)
