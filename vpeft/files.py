"""Files that appear whole or not at all, and safetensors files with their metadata."""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import CheckpointError, VpeftError, WriteError

DEEPEST = 50  # lists and mappings in each other; a configuration has about five
LONGEST_SHOWN = 1000  # characters of a message that repeats what it was given
SURROGATE = re.compile("[\ud800-\udfff]")  # which no file and no terminal can be given
# safetensors' names of the types that torch has.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
_LONGEST_NAME = 200  # bytes of a file's name that a temporary one can be made of, where systems allow 255


def shortened(name: str) -> str:
    """A name for a file made of another file's, so short that a number and an ending fit behind it on any disk.

    Systems count bytes, of which a letter outside of English takes up to four.
    """
    while len(os.fsencode(name)) > _LONGEST_NAME:
        name = name[:-1]
    return name


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; it takes the place of ``path`` when the block ends without an error.

    After a crash the old file is there or the new one, never half of one. Each process writes to a temporary file of its
    own, so that processes that write at once leave one whole file. The folder of ``path`` is made where it is missing.

    Raises:
        WriteError: a full or read-only disk, or a place where no file can be; names the file.
    """
    path = Path(path)
    encoded = os.fsencode(path.name)
    short = path.name if len(encoded) <= _LONGEST_NAME else hashlib.sha256(encoded).hexdigest()
    temporary = path.with_name(f".{short}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        if isinstance(error, WriteError):
            raise
        raise WriteError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """A new temporary folder beside ``path``; it takes the place of ``path`` when the block ends without an error.

    ``path`` then is a folder that is whole. Nothing but an empty folder gives way to it: where another process has been
    first, its folder stays. Whatever happens, the temporary folder is gone afterwards, and nothing else is.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        with suppress(OSError):  # not empty, or not there
            path.rmdir()
        try:
            os.rename(temporary, path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """As ``replacing_folder``; what cannot be written is said under the name that the folder would have had.

    Raises:
        WriteError: a full or read-only disk, or a place where no folder can be.
    """
    temporary = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_folder(path) as temporary:
            yield temporary
    except WriteError as error:
        raise WriteError(str(error).replace(str(temporary), str(path))) from error
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror or error}") from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def refuse_unwritable(path: str | Path) -> None:
    """Refuse a place where no file can be written, before the work that is to be kept there.

    Raises:
        WriteError: a folder, or a place in a file or in a folder that may not be written.
    """
    path = Path(path)
    there = next(p for p in (path.parent, *path.parent.parents) if p.exists())
    if path.is_dir():
        raise WriteError(f"{path} cannot be written: it is a folder")
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise WriteError(f"{path} cannot be written: {there} is no folder in which files can be made")


def with_ending(path: str | Path, ending: str) -> Path:
    """A path with an ending behind it; dots in its name are the name's own, where ``Path.with_suffix`` would cut it."""
    return Path(f"{path}{ending}")


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file of bytes, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; tensors may be on any device, and share their memory."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage().data_ptr()
        plain[name] = own.clone() if storage in seen else own  # safetensors refuses memory that is shared
        seen.add(storage)
    with replacing(path) as temporary:
        temporary.touch()
        rights = temporary.stat().st_mode & 0o777
        save_file(plain, temporary, dict(metadata) if metadata else None)
        temporary.chmod(rights)  # as any other new file's: safetensors may make one that its owner alone can read


@dataclass(frozen=True)
class Shape:
    """What a file's header says of a tensor.

    Attributes:
        size: its shape.
        dtype: its type.
    """

    size: tuple[int, ...]
    dtype: torch.dtype

    def like(self) -> Tensor:
        """A tensor of this shape and type without values, which takes no memory."""
        return torch.empty(self.size, dtype=self.dtype, device="meta")


def read_shapes(path: str | Path) -> tuple[dict[str, str], dict[str, Shape]]:
    """The metadata and the tensors' shapes of a safetensors file; no tensor is read.

    Raises:
        CheckpointError: no path, missing, a folder, or damaged.
    """
    with _opened(path) as f:
        found = {}
        for name in f.keys():  # noqa: SIM118 - safe_open is no mapping
            part = f.get_slice(name)
            found[name] = Shape(tuple(part.get_shape()), _DTYPES[part.get_dtype()])
        return f.metadata() or {}, found


def read_tensors(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a safetensors file, whoever wrote it.

    Raises:
        CheckpointError: no path, missing, a folder, or damaged.
    """
    with _opened(path) as f:
        return f.metadata() or {}, {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118 - safe_open is no mapping


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    path = existing_file(path)
    try:
        with safe_open(path, "pt") as f:
            yield f
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error


def as_path(path: Any) -> Path:
    """A path from what a user gave.

    Raises:
        CheckpointError: it is no path.
    """
    try:
        text = os.fspath(path)
    except TypeError:
        text = None
    if not isinstance(text, str) or "\0" in text:
        raise CheckpointError(f"expected a file's path, got {path!r}"[:LONGEST_SHOWN])
    return Path(path)


def existing_file(path: Any) -> Path:
    """The path of a file that is there.

    Raises:
        CheckpointError: no path, missing, or a folder.
    """
    path = as_path(path)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
    if path.is_dir():
        inside = sorted(file.name for file in path.glob("*.safetensors") if file.name != "state.safetensors")
        raise CheckpointError(f"{path} is a folder" + (f"; give a file of it: {', '.join(inside[:5])}" if inside else ""))
    if not path.is_file():
        raise CheckpointError(f"{path} is no file")
    return path


def writable_file(path: Any) -> Path:
    """The path of a file to be written; its folder is made.

    Raises:
        CheckpointError: no path, a folder, or one where no file can be.
    """
    given, path = path, as_path(path)
    try:
        folder, device = path.is_dir(), path.exists() and not path.is_file()
        if str(given) and not folder:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.is_symlink()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
    if not str(given) or folder:
        raise CheckpointError(f"'{given}' is {'a folder' if str(given) else 'no path'}; give the path of a file")
    if device:  # a file would take its place
        raise CheckpointError(f"{path} is no file that could be replaced")
    if not os.access(path.parent, os.W_OK):
        raise CheckpointError(f"{path} cannot be written: no right to write in its folder")
    return path


@contextmanager
def naming(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Under here the library's errors, and those of other ``kinds``, become a ``CheckpointError`` that names the file."""
    try:
        yield
    except (VpeftError, *kinds) as error:
        if isinstance(error, CheckpointError | WriteError) and str(path) in str(error):
            raise
        text = str(error) or type(error).__name__
        raise CheckpointError(f"{path}: {text if len(text) <= LONGEST_SHOWN else f'{text[:LONGEST_SHOWN]}…'}") from error


def parse_json(text: str, path: Path) -> Any:
    """What a file's JSON text holds; ``NaN`` and infinities, which are no JSON but which Python writes, are taken.

    Raises:
        CheckpointError: it is no JSON, or its lists and mappings lie in each other more than ``DEEPEST`` times.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: its metadata are no JSON ({error})") from error
    level, depth = [found], 0
    while level := [v for x in level for v in _inside(x)]:
        depth += 1
        if depth > DEEPEST:
            raise CheckpointError(f"{path}: its metadata are nested more than {DEEPEST} deep")
        if any(isinstance(x, str) and SURROGATE.search(x) for x in level):
            raise CheckpointError(f"{path}: its metadata hold half a character")
    return found


def no_folder(path: str | Path | None) -> str:
    """Why something that was given as a folder is none, in words."""
    if path is None or not str(path):
        return "no folder is given"
    return f"'{path}' is a file, not a folder" if Path(path).exists() else f"folder '{path}' does not exist"


def _inside(value: Any) -> Iterable[Any]:
    return (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()


def shipped(folder: str) -> Path:
    """A folder of the repository's top level that the package carries: inside the package where it was built into a wheel.

    Raises:
        VpeftError: the installation lacks it.
    """
    package = Path(__file__).parent
    for place in (package / "shipped" / folder, package.parent / folder):
        if place.is_dir():
            return place
    raise VpeftError(
        f"this installation of vpeft has no folder '{folder}'; install the wheel or a clone of the repository again"
    )


def sha256_of(path: str | Path) -> str:
    """A file's SHA-256, in hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
