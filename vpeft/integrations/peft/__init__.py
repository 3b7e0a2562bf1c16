"""huggingface peft's adapter files, written and read without peft: a JSON file and a safetensors file."""

from .reading import from_peft
from .writing import to_peft

__all__ = ["from_peft", "to_peft"]
