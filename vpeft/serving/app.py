"""The HTTP interface: ``POST /predict``, ``GET /tasks``, ``POST /tasks/NAME/reload``, ``/healthz`` and ``/metrics``."""

import asyncio
import base64
import json
import logging
import time
import warnings
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from ..errors import DataError, VpeftError, did_you_mean, shown
from .batcher import Batcher, Closed
from .book import Book, Entry
from .forward import Item, Reloaded, prepared
from .metrics import TEXT, Metrics
from .settings import ServeOptions
from .shelf import AdapterError, Shelf
from .uploads import RequestError, Upload, opened, read_upload

PNG, JSON = "image/png", "application/json"
READ = ["GET", "HEAD"]
GONE = 499  # nginx's number for a client that went away; nobody reads it
logger = logging.getLogger(__name__)


class Json(JSONResponse):
    """JSON in UTF-8; what UTF-8 cannot say, such as half a pair of surrogates in a class's name, is escaped."""

    def render(self, content: Any) -> bytes:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "backslashreplace")  # for these characters, Python's escapes are JSON's


class Service:
    """A book that is served: the thread of the model, those that prepare images, and what is counted.

    Attributes:
        open: requests that were accepted and not yet answered.
        closing: nothing new is accepted.
    """

    def __init__(self, book: Book, options: ServeOptions, device: str = "cpu"):
        self.book, self.options, self.metrics = book, options, Metrics()
        self.open, self.closing = 0, False
        m = self.metrics
        self.shelf = Shelf(book, options.memory_bytes, device, lambda what: m.shelf.labels(what).inc())
        self.batcher = Batcher(
            self.shelf, options.window_ms / 1000, options.max_batch, options.threads, m.batch.observe,
            lambda how, images: m.forwards.labels(how).inc(), lambda: self.open,
        )  # fmt: skip
        self.pool = ThreadPoolExecutor(options.workers, "vpeft-image")
        m.gauge("vpeft_queue_length", "Images that wait for a batch", lambda: self.batcher.waiting)
        m.gauge("vpeft_open_requests", "Requests that were accepted and not yet answered", lambda: self.open)
        m.gauge("vpeft_loaded_adapters", "Adapters on the backbone", lambda: len(self.shelf.loaded))
        m.gauge("vpeft_loaded_bytes", "Bytes of these adapters' tensors", lambda: self.shelf.bytes)

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return not self.closing and self.batcher.thread.is_alive()

    def close(self) -> None:
        """Answer what was accepted, and end."""
        self.closing = True
        self.pool.shutdown(wait=True)
        self.batcher.close()

    # ---- one request ----

    async def predict(self, request: Request) -> Response:
        """The answer to an image; whatever happens is counted."""
        start, said = time.monotonic(), {"task": ""}
        status = GONE
        try:
            response = await self._predict(request, said)
            status = response.status_code
            return response
        except RequestError as error:
            status = error.status
            return problem(error)
        except ClientDisconnect:
            return Response(status_code=GONE)
        except Exception:
            status = 500
            raise
        finally:
            self.metrics.requests.labels(said["task"], str(status)).inc()
            self.metrics.latency.labels(said["task"]).observe(time.monotonic() - start)

    async def _predict(self, request: Request, said: dict[str, str]) -> Response:
        if not self.alive:
            raise RequestError(503, "the server is shutting down", Connection="close")
        if self.open >= self.options.queue:
            raise RequestError(503, f"{self.open} requests are waiting (--queue); come again", Retry_After="1")
        self.open += 1
        try:
            upload = await read_upload(request, self.options.body_bytes, self.options.timeout)
            entry = self._entry(upload.fields.get("task"))
            said["task"] = entry.name
            while True:
                topk, kind = _topk(entry, upload), _kind(entry, upload, request)
                if entry.error is not None:
                    raise RequestError(503, f"task '{entry.name}': {entry.error}")
                with suppress(Reloaded):  # then all of this again, with the file as it is now
                    return _response(entry, kind, await self._answered(request, entry, upload, topk))
        finally:
            self.open -= 1

    def _entry(self, name: str | None) -> Entry:
        if name is None:
            raise RequestError(422, f"task: missing; known: {', '.join(sorted(self.book.entries)[:50])}")
        if name not in self.book.entries:
            raise RequestError(404, f"task: {shown(name)} is not served here{did_you_mean(name, self.book.entries)}")
        return self.book.entries[name]

    async def _answered(self, request: Request, entry: Entry, upload: Upload, topk: int | None) -> dict[str, Any]:
        """The task's answer; the image is left out where its client goes away before its batch begins.

        Raises:
            RequestError: 4xx of the image, 503 of the task's file, 500 of the model, 504 where it takes too long.
            ClientDisconnect: nobody is there any more.
            Reloaded: the task has another file now.
        """
        jobs: list[Future] = []

        async def work() -> dict[str, Any]:
            loop = asyncio.get_running_loop()
            item = await loop.run_in_executor(self.pool, self._prepare, entry, upload.data, topk)
            jobs.append(self.batcher.submit(item))
            return await asyncio.wrap_future(jobs[0])

        working, gone = asyncio.ensure_future(work()), asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait((working, gone), timeout=self.options.timeout, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            if gone.done():
                raise ClientDisconnect
            raise RequestError(504, f"no answer within {self.options.timeout:g} seconds (--timeout)", Retry_After="1")
        except RequestError:
            raise
        except (ClientDisconnect, Reloaded, asyncio.CancelledError):
            raise
        except Closed:
            raise RequestError(503, "the server is shutting down", Connection="close") from None
        except VpeftError as error:
            status = 503 if isinstance(error, AdapterError) else 500
            raise RequestError(status, f"task '{entry.name}': {error}") from error
        except Exception as error:
            if self.closing:  # the threads take nothing more
                raise RequestError(503, "the server is shutting down", Connection="close") from error
            logger.exception("task '%s' failed", entry.name)
            raise RequestError(500, f"task '{entry.name}': {type(error).__name__}") from error
        finally:
            for waiting in (working, gone):
                waiting.cancel()
            for job in jobs:
                job.cancel()

    def _prepare(self, entry: Entry, data: bytes, topk: int | None) -> Item:
        image = opened(data, self.options.max_pixels)
        try:
            return prepared(entry, image, topk)
        except DataError as error:  # more pixels, once resized, than may be
            raise RequestError(413, f"image: {error}") from error
        except VpeftError as error:
            raise RequestError(422, f"image: {error}") from error

    # ---- the others ----

    def described(self, entry: Entry) -> dict[str, Any]:
        """What ``GET /tasks`` says of a task."""
        held, file = self.shelf.loaded.get(entry.name), entry.file
        found: dict[str, Any] = {"task": entry.name, "answer": entry.serves, "error": entry.error}
        if file is None:
            return found
        names = file.metadata["class_names"]
        return found | {
            "method": file.metadata["method"]["name"],
            "classes": entry.class_count if names is None else [str(n) for n in names],
            "topk": entry.topk,
            "bytes": entry.bytes if held is None else held.bytes,
            "loaded": held is not None,
            "routed": None if held is None else held.routed,
        }

    async def reload(self, name: str) -> Response:
        """Take a task's file as it is now."""
        if not self.alive:
            raise RequestError(503, "the server is shutting down", Connection="close")
        entry = self._entry(name)
        try:
            read = await asyncio.to_thread(self.shelf.read_again, name)  # perhaps a download
            await asyncio.wrap_future(self.batcher.call(lambda: self.shelf.reload(name, read)))
        except Closed:
            raise RequestError(503, "the server is shutting down", Connection="close") from None
        except VpeftError as error:
            raise RequestError(503, f"task '{name}': {error}") from error
        return Json(self.described(entry))


def create_app(service: Service) -> FastAPI:
    """The application around a service, which is closed when the application ends."""
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # --max-pixels says how many are too many

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="vpeft", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None,
        redirect_slashes=False,  # to an address that the client's own Host header says
    )  # fmt: skip
    app.state.service = service

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        return await service.predict(request)

    @app.api_route("/tasks", methods=READ)
    async def tasks() -> Response:
        return Json({"tasks": [service.described(entry) for entry in service.book.entries.values()]})

    @app.post("/tasks/{name}/reload")
    async def reload(name: str) -> Response:
        return await service.reload(name)

    @app.api_route("/healthz", methods=READ)
    async def healthz() -> Response:
        state = "ok" if service.alive else "closing" if service.closing else "dead"
        return Json({"status": state, "tasks": len(service.book.entries)}, 200 if service.alive else 503)

    @app.api_route("/metrics", methods=READ)
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"content-type": TEXT})

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return problem(error)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        text = f"{request.method} {request.url.path}: {error.detail}"
        return Json({"error": text}, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return Json({"error": f"{type(error).__name__} in the server"}, 500)

    return app


def problem(error: RequestError) -> Response:
    """An error as JSON: ``{"error": …}``."""
    return Json({"error": error.text}, error.status, headers=error.headers)


async def _gone(request: Request) -> None:
    """Returns when the client has gone away; the body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _topk(entry: Entry, upload: Upload) -> int | None:
    text = upload.fields.get("topk")
    if text is None:
        return None
    if entry.serves == "mask":
        raise RequestError(422, f"topk: task '{entry.name}' gives a mask, each pixel has one class; leave it out")
    number = text.lstrip("0") if text.isascii() and text.isdecimal() else ""
    if not number:
        raise RequestError(422, f"topk: {shown(text)} is no whole number above 0")
    if len(number) > 9 or int(number) > entry.class_count > 0:
        said = number if len(number) < 20 else shown(number)
        raise RequestError(422, f"topk: {said} classes asked for, but task '{entry.name}' has {entry.class_count}")
    return int(number)


def _kind(entry: Entry, upload: Upload, request: Request) -> str:
    """The content type of the answer: ``format`` says it, or, for masks, an ``Accept`` of PNG alone."""
    given = upload.fields.get("format")
    if given not in (None, "json", "png"):
        raise RequestError(422, f"format: {shown(given)}{did_you_mean(given, ('json', 'png'))}")
    if given == "png" and entry.serves != "mask":
        raise RequestError(422, f"format: task '{entry.name}' gives classes, not a mask; leave it out")
    if given is None and entry.serves == "mask" and request.headers.get("accept", "").strip().lower() == PNG:
        return PNG
    return PNG if given == "png" else JSON


def _response(entry: Entry, kind: str, answer: dict[str, Any]) -> Response:
    if kind == PNG:
        return Response(answer["mask"], media_type=PNG)
    if "mask" in answer:
        answer = answer | {"mask": base64.b64encode(answer["mask"]).decode()}
    return Json({"task": entry.name, **answer})
