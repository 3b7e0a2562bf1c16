"""A trained model without this library: a plain timm folder, a ``torch.export`` program, or ONNX."""

from .run import Report, export

__all__ = ["Report", "export"]
