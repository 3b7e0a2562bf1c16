"""Files over http(s): resumed where they were cut, compared with their checksum, and put in place when they are whole.

urllib does it: it is everywhere that Python is, and huggingface_hub's client is another one in each of its versions.
"""

import http.client
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import DownloadError, WriteError
from ..files import write_text
from .places import alone, digest, offline, place_of, timeout
from .progress import DownloadBar

BLOCK = 2**16
LARGEST = 20 * 2**30  # bytes of a file of which nobody said how large it is
STALLS = 3  # attempts without a byte more than before, after which one gives up
PAUSE = 0.1  # seconds before the next attempt; twice as many after each
_AGAIN = {408, 425, 429, 500, 502, 503, 504}
logger = logging.getLogger(__name__)
Check = Callable[[Path], Any]


@dataclass
class _Seen:
    """What a server said of a file.

    Attributes:
        etag, modified: its validators, empty where there are none.
        total: bytes, None where it did not say.
        sha256: of the whole file, once it was here.
    """

    etag: str = ""
    modified: str = ""
    total: int | None = None
    sha256: str = ""

    @property
    def validator(self) -> str:
        """What ``If-Range`` takes: no weak tag."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified

    def contradicts(self, other: "_Seen") -> bool:
        """Whether an answer is surely of another version of the file: only what both say can tell.

        A date says nothing where both have a tag: mirrors of one file have dates of their own.
        """
        if self.total is not None and other.total is not None and self.total != other.total:
            return True
        if self.etag and other.etag:
            return self.etag.removeprefix("W/") != other.etag.removeprefix("W/")
        return bool(self.modified and other.modified and self.modified != other.modified)

    @classmethod
    def of(cls, file: Path) -> "_Seen":
        """Read from beside a file; what is damaged says nothing."""
        try:
            found = cls(**json.loads(file.read_text()))
            fits = all(isinstance(v, str) for v in (found.etag, found.modified, found.sha256))
            return found if fits and isinstance(found.total, int | None) else cls()
        except (OSError, ValueError, TypeError):
            return cls()


class _Cut(Exception):
    """A connection that ended, or never began; another attempt may help."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """urllib's, which ends circles, for http and https alone, and never from the safe one to the other."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in ("http", "https") or (old.scheme == "https" and new.scheme == "http"):
            raise DownloadError(f"leads to {new.scheme}://{new.hostname}, which is refused")
        return urllib.request.Request(newurl, headers=req.headers, origin_req_host=req.origin_req_host, unverifiable=True)

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # Python 3.10 does not know it


def check_url(url: str) -> None:
    """Refuse what is no address of a file.

    Raises:
        DownloadError: no host, a password in it, or characters that no address has.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise DownloadError(f"{url[:200]!r} is no address: {error}") from None
    if "@" in parts.netloc:
        raise DownloadError(f"{parts.scheme}://…@{parts.hostname}: an address with a password in it is not taken")
    if not parts.hostname or not url.isascii() or not url.isprintable() or " " in url:
        raise DownloadError(f"{url[:200]!r} is no address of a file; write other characters as %XX")


def fetch(url: str, *, check: Check, sha256: str | None = None, size: int | None = None, most: int = LARGEST) -> Path:
    """A URL's file in the cache, downloaded where it is not there or has changed.

    With a checksum a file that is there needs no network. Without one the server is asked whether it changed; where no
    server can be reached, the file that is there is taken, with a warning.

    Args:
        url: http or https.
        check: called with the whole file before it is put in place; raises where it is not what it should be.
        sha256: of the file, where it is known.
        size: in bytes, where it is known.
        most: bytes, where the size is not known; a longer file is refused without being downloaded.

    Raises:
        DownloadError: it cannot be had; names the URL.
        WriteError: the cache cannot be written to.
    """
    check_url(url)
    target = place_of(url)
    with alone(target):
        there = _there(target, sha256)
        if there is not None and (sha256 or offline()):
            return target
        if offline():
            raise DownloadError(
                f"{url} is not in the cache {target.parent}, and the network is off (VPEFT_OFFLINE, HF_HUB_OFFLINE)"
            )
        try:
            return _Transfer(url, target, check, sha256, size, most, there).run()
        except _Cut as error:
            if there is None:
                raise DownloadError(f"{url} cannot be downloaded: {error}") from None
            logger.warning("%s cannot be reached (%s); the copy in the cache is taken", url, error)
            return target
        except DownloadError as error:
            raise DownloadError(str(error) if url in str(error) else f"{url}: {error}") from None


def _there(target: Path, sha256: str | None) -> _Seen | None:
    """What is known of the file in the cache, where it is there and has not changed since."""
    if not target.is_file():
        return None
    seen = _Seen.of(_beside(target))
    wanted = sha256 or seen.sha256
    return seen if wanted and digest(target) == wanted else None


def _beside(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")


class _Transfer:
    """One file on its way: attempts until it is whole.

    Args:
        url, check, sha256, size, most: see ``fetch``.
        target: where it goes.
        there: what is known of an earlier file in its place.
    """

    def __init__(
        self, url: str, target: Path, check: Check, sha256: str | None, size: int | None, most: int, there: _Seen | None
    ):
        self.url, self.target, self.check, self.sha256, self.size, self.there = url, target, check, sha256, size, there
        self.most = most if size is None else size
        self.part = target.with_name(f"{target.name}.part")
        self.seen = _Seen.of(_beside(self.part))
        self.resumed = False
        handlers = (urllib.request.HTTPHandler, urllib.request.HTTPSHandler, _Redirects, urllib.request.ProxyHandler,
                    urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor)  # fmt: skip
        self.opener = urllib.request.OpenerDirector()  # and so none for file:, ftp: and data:
        for handler in handlers:
            self.opener.add_handler(handler())
        self.opener.addheaders = [("User-Agent", "vpeft")]

    def run(self) -> Path:
        """The file in its place.

        Raises:
            _Cut: no attempt came further than the ones before.
        """
        stalls, furthest = 0, self._have()
        while True:
            try:
                if self._attempt():
                    return self.target
            except _Cut as error:
                have = self._have()
                stalls, furthest = (0, have) if have > furthest else (stalls + 1, furthest)
                if stalls >= STALLS:
                    raise _Cut(f"{error} ({have} bytes are kept for the next time)" if have else str(error)) from None
                time.sleep(PAUSE * 2**stalls)

    def _have(self) -> int:
        """Bytes of the part that can be gone on from."""
        if not self.part.is_file() or not (self.sha256 or self.seen.validator):
            return 0
        return self.part.stat().st_size

    def _attempt(self) -> bool:
        """One connection; whether the file is in its place."""
        have = self._have()
        if have and have in (self.size, self.seen.total):  # a process was killed between the last byte and the end
            self.resumed = True
            return self._whole()
        with closing(self._opened(have)) as response:
            if response.status == 304:
                return True
            start = self._start(response, have)
            self.resumed = self.resumed or start > 0
            self._receive(response, start)
        return self._whole()

    def _opened(self, have: int) -> Any:
        """The server's answer, of status 200, 206 or 304."""
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if self.seen.validator:
                headers["If-Range"] = self.seen.validator
        elif self.there is not None and self.there.etag:
            headers["If-None-Match"] = self.there.etag
        elif self.there is not None and self.there.modified:
            headers["If-Modified-Since"] = self.there.modified
        try:
            return self.opener.open(urllib.request.Request(self.url, headers=headers), timeout=timeout())
        except urllib.error.HTTPError as error:
            with closing(error):
                return self._answered(error)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise _Cut(_text(reason)) from None
        except ValueError as error:  # a redirect to what is no address
            raise DownloadError(_text(error)) from None

    def _answered(self, error: urllib.error.HTTPError) -> Any:
        if error.code == 304:
            return error
        if error.code == 416:
            self._drop()
            raise _Cut("the server has no such range")
        if error.code in _AGAIN:
            raise _Cut(f"the server answers {error.code} {error.reason}")
        if 300 <= error.code < 400:
            raise DownloadError(f"redirected without end, or to nowhere ({error.code})")
        raise DownloadError(f"the server answers {error.code} {error.reason}")

    def _start(self, response: Any, have: int) -> int:
        """Where the answer's first byte belongs; what the server says is kept beside the part."""
        header = response.headers
        if (header.get("Content-Encoding") or "identity").lower() != "identity":
            raise DownloadError(f"the server sends it as {header['Content-Encoding']}, which was not asked for")
        length, start, total = _number(header.get("Content-Length")), 0, None
        if response.status == 206:
            span, _, after = (header.get("Content-Range") or "").removeprefix("bytes ").partition("/")
            start, total = _number(span.partition("-")[0]), _number(after)
            if start != have:
                self._drop()
                raise _Cut("the server sends another range than the one asked for")
        elif response.status != 200:
            raise DownloadError(f"the server answers {response.status}")
        total = start + length if total is None and length is not None else total
        if total is not None and (total > self.most or (self.size is not None and total != self.size)):
            self._drop()
            raise DownloadError(
                f"the server has a file of {total} bytes; expected {'at most ' * (self.size is None)}{self.most}"
            )
        seen = _Seen(header.get("ETag") or "", header.get("Last-Modified") or "", total)
        if start:
            if self.seen.contradicts(seen):  # the server does not know If-Range, or does not heed it
                self._drop()
                raise _Cut("the file on the server changed while it was downloaded")
            # A part's answer may leave out what the first one said.
            seen = _Seen(seen.etag or self.seen.etag, seen.modified or self.seen.modified, total or self.seen.total)
        self.seen = seen
        write_text(_beside(self.part), json.dumps(asdict(self.seen)))
        return start

    def _receive(self, response: Any, start: int) -> None:
        """The answer's bytes, behind the first ``start`` of the part."""
        most, have, total = self.most, start, self.seen.total
        try:
            file = self.part.open("r+b" if start else "wb")
        except OSError as error:
            raise WriteError(f"{self.part} cannot be written: {error.strerror}") from error
        with file, DownloadBar(self.target.name, start, total) as advance:
            file.seek(start)
            file.truncate()
            while True:
                try:
                    block = response.read1(BLOCK)  # what is there, so that a kill loses nothing
                except (OSError, http.client.HTTPException) as error:
                    raise _Cut(f"the connection broke after {have} bytes: {_text(error)}") from None
                if not block:
                    break
                try:
                    file.write(block)
                    file.flush()
                except OSError as error:
                    raise WriteError(f"{self.part} cannot be written: {error.strerror}") from error
                have += len(block)
                advance(len(block))
                if have > most:
                    break
        if have > most:
            self._drop()
            raise DownloadError(f"the server sends more than {most} bytes")
        wanted = total if total is not None else self.size
        if wanted is not None and have != wanted:
            raise _Cut(f"the server sent {have} of {wanted} bytes")

    def _whole(self) -> bool:
        """Put the file in place, where it is the right one; False where it is to be had again from the start."""
        found = digest(self.part)
        if self.sha256 and found != self.sha256:
            resumed, self.resumed = self.resumed, False
            self._drop()
            if resumed:  # the halves may be of two versions
                return False
            raise DownloadError(f"wrong checksum: SHA-256 {found}, expected {self.sha256}; nothing of it is kept")
        try:
            self.check(self.part)
        except Exception as error:
            self._drop()
            raise DownloadError(str(error).replace(str(self.part), "what the server sent")) from None
        self.seen.sha256 = found
        write_text(_beside(self.target), json.dumps(asdict(self.seen)))  # before: a file without it is had again
        try:
            self.part.replace(self.target)
        except OSError as error:
            raise WriteError(f"{self.target} cannot be written: {error.strerror}") from error
        _beside(self.part).unlink(missing_ok=True)
        return True

    def _drop(self) -> None:
        self.seen = _Seen()
        with suppress(OSError):
            self.part.unlink(missing_ok=True)
            _beside(self.part).unlink(missing_ok=True)


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 20 else None


def _text(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
