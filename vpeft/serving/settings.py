"""How a book is served: the options of ``vpeft serve``, with their bounds."""

import re
from dataclasses import dataclass, fields
from typing import Any

from ..errors import ConfigError, shown
from ..options import SIZE, check_values, declared, option

_UNITS = {"": 1, "B": 1, **{f"{k}{b}B": n**p for p, k in enumerate("KMG", 1) for b, n in (("", 1000), ("i", 1024))}}


@dataclass(frozen=True)
class ServeOptions:
    """Limits and sizes of the server; of a list, ``memory``, ``max_batch``, ``threads`` and ``device`` count."""

    host: str = option("127.0.0.1", pattern=r"\S+", free="a host's name or address", help="address to listen at")
    port: int = option(8000, ge=0, le=65535, help="to listen at; 0 for any free one")
    device: str = option("", pattern=r"|cpu|cuda(:\d+)?|mps", free="cpu, cuda or cuda:N", help="the GPU where there is one")
    threads: int = option(0, ge=0, le=1024, unit="threads", help="torch's threads of a forward; 0 for torch's own choice")
    workers: int = option(2, ge=1, le=256, unit="threads", help="threads that decode and prepare images")
    memory: str = option("512MB", pattern=r"\S+", free="a number of bytes", help="bound of all loaded adapters together")
    window_ms: float = option(3.0, ge=0, le=10_000, unit="milliseconds", help="how long a batch waits for more images")
    max_batch: int = option(32, ge=1, le=SIZE, unit="images", help="images in a forward at most")
    queue: int = option(256, ge=1, le=100_000, unit="requests", help="accepted and not yet answered ones, above: status 503")
    timeout: float = option(30.0, gt=0, le=86_400, unit="seconds", help="for a request's body, and then for its answer")
    max_bytes: str = option("16MB", pattern=r"\S+", free="a number of bytes", help="largest body of a request")
    max_pixels: int = option(50_000_000, ge=1, le=178_956_970, unit="pixels", help="largest image, before it is decoded")

    def __post_init__(self) -> None:
        check_values(type(self), {f.name: getattr(self, f.name) for f in fields(self)}, ConfigError, "--")
        size_of("--memory", self.memory)
        size_of("--max-bytes", self.max_bytes)

    @property
    def memory_bytes(self) -> int:
        """``memory`` as a number."""
        return size_of("--memory", self.memory)

    @property
    def body_bytes(self) -> int:
        """``max_bytes`` as a number."""
        return size_of("--max-bytes", self.max_bytes)


def size_of(name: str, text: str) -> int:
    """The number of bytes that a text such as ``512MB``, ``1.5GiB`` or ``1000000`` says.

    Raises:
        ConfigError: it says none, or none above 0.
    """
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?) *([A-Za-z]{0,3})", text.strip())
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise ConfigError(f"{name}: {shown(text)} is no size; give a number of bytes, such as 512MB or 1GiB")
    found = int(float(match[1]) * units[match[2].lower()])
    if found < 1:
        raise ConfigError(f"{name}: {shown(text)} is less than one byte")
    return found


def options_of(values: dict[str, Any]) -> ServeOptions:
    """The options among the arguments of a command; those that are None keep their defaults."""
    names = {this.name for this in declared(ServeOptions)}
    return ServeOptions(**{name: value for name, value in values.items() if name in names and value is not None})
