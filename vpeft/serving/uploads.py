"""From a request's bytes to an image for the model: limits while it is read, and an error of HTTP for each wrong thing."""

import asyncio
import io
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from PIL import Image, UnidentifiedImageError
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from ..data.images import FORMATS, known_formats, open_image
from ..errors import DataError, did_you_mean, shown

FIELDS = ("task", "topk", "format")
_FIELD = 10_000  # bytes of a field that is no file
_DRAIN = (8 * 2**20, 1.0)  # bytes and seconds for which what is too much is still taken, so that the answer is read


class RequestError(Exception):
    """What is wrong with a request, with its status.

    Attributes:
        status: of HTTP.
        text: in one line.
        headers: of the answer.
    """

    def __init__(self, status: int, text: str, **headers: str):
        super().__init__(text)
        self.status, self.text = status, text
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass
class Upload:
    """What a request holds: the file's bytes and the fields, each a text."""

    data: bytes
    fields: dict[str, str]


async def read_upload(request: Request, limit: int, timeout: float) -> Upload:
    """Read a request's body: a form with the file ``image``, or the image itself.

    Args:
        request: its query may hold the fields too.
        limit: bytes of the body.
        timeout: seconds until all of it must be there.

    Raises:
        RequestError: 408, 413, 415 or 422.
        ClientDisconnect: nobody is there any more.
    """
    fields = _fields(request.query_params.multi_items(), {})
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        if int(declared) <= _DRAIN[0]:
            await _drain(request)
        raise _too_large(limit)
    try:
        async with asyncio.timeout(timeout) if hasattr(asyncio, "timeout") else _Timeout(timeout):
            if kind == "multipart/form-data":
                return await _form(request.headers, _limited(request, limit), fields)
            if kind == "application/x-www-form-urlencoded":  # also what curl says of --data-binary
                await _drain(request)
                raise RequestError(
                    422,
                    "image: this kind of form holds no file; send multipart/form-data (curl -F image=@FILE), or the image "
                    "itself with its content type (curl -H 'Content-Type: image/png' --data-binary @FILE)",
                )
            if kind and not kind.startswith("image/") and kind != "application/octet-stream":
                await _drain(request)
                raise RequestError(
                    415,
                    f"content type {shown(kind)}: send the form field 'image' (multipart/form-data), or the image itself",
                )
            return Upload(b"".join([part async for part in _limited(request, limit)]), fields)
    except asyncio.TimeoutError:
        raise RequestError(408, f"the body did not arrive within {timeout:g} seconds", Connection="close") from None


class _Timeout:
    """``asyncio.timeout``, which Python 3.10 lacks."""

    def __init__(self, seconds: float):
        self.seconds, self.over = seconds, False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()

        def stop() -> None:
            self.over = True
            task.cancel()

        self.timer = asyncio.get_running_loop().call_later(self.seconds, stop)

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.timer.cancel()
        if kind is asyncio.CancelledError and self.over:
            raise asyncio.TimeoutError


async def _limited(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body's parts; what is more than the limit is refused when it comes."""
    count = 0
    async for part in request.stream():
        count += len(part)
        if count > limit:
            await _drain(request)
            raise _too_large(limit)
        yield part


def _too_large(limit: int) -> RequestError:
    return RequestError(413, f"the body is larger than {limit} bytes (--max-bytes)", Connection="close")


async def _drain(request: Request) -> None:
    """Take a little more of a body that is refused: a client that still sends would not see the answer."""
    room, seconds = _DRAIN

    async def rest() -> None:
        count = 0
        while count < room:
            message = await request.receive()
            count += len(message.get("body", b""))
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                return

    try:
        await asyncio.wait_for(rest(), seconds)
    except asyncio.TimeoutError:
        return


async def _form(headers: Headers, stream: AsyncIterator[bytes], fields: dict[str, str]) -> Upload:
    """Raises RequestError: 422; a form without the file, with two, or with what it should not hold."""
    try:
        form = await MultiPartParser(headers, stream, max_files=1, max_fields=len(FIELDS), max_part_size=_FIELD).parse()
    except MultiPartException as error:
        raise RequestError(422, f"the form cannot be read: {error.message}") from error
    except (KeyError, ValueError, UnicodeError) as error:
        raise RequestError(422, f"the form cannot be read: {error}") from error
    try:
        files = [(name, value) for name, value in form.multi_items() if isinstance(value, UploadFile)]
        fields = _fields([(n, v) for n, v in form.multi_items() if isinstance(v, str)], fields)
        if not files:
            raise RequestError(422, "image: the form has no file of this name")
        ((name, file),) = files
        if name != "image":
            raise RequestError(422, f"{shown(name)}: the file's field must be called 'image'")
        return Upload(await file.read(), fields)
    finally:
        await form.close()


def _fields(items: list[tuple[str, str]], known: dict[str, str]) -> dict[str, str]:
    """Fields that stand there once.

    Raises:
        RequestError: 422; an unknown one, or two values of one.
    """
    found = dict(known)
    for name, value in items:
        if name not in FIELDS:
            if name == "image":
                raise RequestError(422, "image: expected a file, got a text")
            raise RequestError(422, f"{shown(name)}: unknown field{did_you_mean(name, (*FIELDS, 'image'))}")
        if found.setdefault(name, value) != value:
            raise RequestError(422, f"{name}: {shown(found[name])} and {shown(value)}; give one")
    return found


def opened(data: bytes, max_pixels: int) -> Image.Image:
    """An upright RGB image from a file's bytes.

    Raises:
        RequestError: 413, 415 or 422 for none, and 400 for one that is damaged.
    """
    if not data:
        raise RequestError(422, "image: no bytes were sent")
    try:
        with Image.open(io.BytesIO(data), formats=known_formats()) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise RequestError(413, f"image: more than {max_pixels} pixels (--max-pixels)") from error
    except UnidentifiedImageError as error:
        raise RequestError(415, f"image: these {len(data)} bytes are no image ({', '.join(FORMATS)})") from error
    except Exception as error:  # PIL's readers fail with every class of error on damaged files
        text = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(400, f"image: not a readable image: {text[:300]}") from error
    if width * height > max_pixels:
        raise RequestError(413, f"image: {width}x{height} are more than {max_pixels} pixels (--max-pixels)")
    try:
        return open_image(io.BytesIO(data), "image")
    except DataError as error:
        raise RequestError(400, str(error)[:500]) from error
