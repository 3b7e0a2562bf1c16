"""What may stand where a checkpoint is taken, and the file that it names."""

import re
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DownloadError
from ..files import as_path, read_shapes
from . import http, hub
from .index import open_index

ZOO = "zoo:"
ENDING = ".safetensors"
KINDS = "zoo:NAME, https://…, hf://user/repo/file@revision, or a path"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_CHECKSUM = re.compile(r"sha256=([0-9a-fA-F]{64})")


def is_source(given: Any) -> bool:
    """Whether this is the name of something that may have to be brought here: a text that is no plain path.

    A file whose name looks so is meant by ``./zoo:name``, or by a ``Path``.
    """
    return isinstance(given, str) and (given.startswith(ZOO) or _SCHEME.match(given) is not None)


def local_file(given: Any) -> Path:
    """The path on this machine of what a user gave as a checkpoint; a plain path is not looked at.

    Args:
        given: ``zoo:NAME``; an http(s) URL of a ``.safetensors`` file, with ``#sha256=…`` behind it where that is known;
            ``hf://user/repo/file@revision``; or a path.

    Raises:
        DownloadError: it cannot be had; names it.
        CheckpointError: it is neither text nor a path.
    """
    if not is_source(given):
        return as_path(given)
    if given.startswith(ZOO):
        return _of_zoo(given.removeprefix(ZOO))
    scheme, _, rest = given.partition("://")
    scheme = scheme.lower()
    if "@" in rest.partition("/")[0]:  # before it could be in a message
        raise DownloadError(f"{scheme}://…: an address with a password in it is not taken")
    if scheme == "hf":
        place = hub.Place.of(given)
        if not place.file or not place.file.endswith(ENDING):
            raise DownloadError(f"{given}: only files that end in {ENDING} are taken, for no pickle is loaded")
        file = hub.fetch(place)
        read_shapes(file)
        return file
    if scheme in ("http", "https"):
        return _of_url(f"{scheme}://{rest}")
    raise DownloadError(f"{given[:200]}: {scheme}:// is not known here; give {KINDS}")


def _of_zoo(name: str) -> Path:
    index = open_index()
    entry = index.entry(name)
    if entry["kind"] != "adapter":
        raise DownloadError(
            f"zoo:{name} is a backbone, no adapter: timm.create_model('{entry['backbone']}', pretrained=True)"
        )
    return index.file(name)


def _of_url(url: str) -> Path:
    url, _, fragment = url.partition("#")
    known = _CHECKSUM.fullmatch(fragment)
    if fragment and not known:
        raise DownloadError(f"{url}#{fragment[:100]}: behind # stands sha256= and 64 hexadecimal digits, or nothing")
    if not PurePosixPath(url.partition("?")[0]).name.endswith(ENDING):
        raise DownloadError(f"{url[:300]}: only files that end in {ENDING} are taken, for no pickle is loaded")
    return http.fetch(url, check=read_shapes, sha256=known and known[1].lower())
