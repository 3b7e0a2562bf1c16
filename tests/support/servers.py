"""A web server on loopback that misbehaves as it is told, and counts what it sent."""

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Served:
    """A path of the server.

    Attributes:
        body: its bytes.
        etag: sent with it; made of the body where None, none where empty.
        modified: ``Last-Modified``.
        ranges: honours ``Range``.
        conditions: honours ``If-Range``; without, a range is sent whatever has changed.
        cuts: of the first answers, how many bytes are sent before the connection is closed.
        statuses: of the first answers.
        to: where it redirects.
        block, pause: sent in blocks of so many bytes, with so many seconds between them.
        length: says how long it is.
        headers: further ones.
    """

    body: bytes = b""
    etag: str | None = None
    modified: str = ""
    ranges: bool = True
    conditions: bool = True
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    to: str = ""
    code: int = 302
    block: int = 2**20
    pause: float = 0.0
    length: bool = True
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def tag(self) -> str:
        return f'"{hashlib.sha256(self.body).hexdigest()[:16]}"' if self.etag is None else self.etag


@dataclass
class Answer:
    """What was asked for and sent.

    Attributes:
        path, headers: of the request.
        status: of the answer.
        sent: bytes of its body.
    """

    path: str
    headers: dict[str, str]
    status: int = 0
    sent: int = 0


class Server:
    """A context: serves ``paths`` on loopback, each request in its own thread.

    Attributes:
        paths: what it has.
        log: what was asked for and sent.
    """

    def __init__(self, **paths: Served):
        self.paths: dict[str, Served] = dict(paths)
        self.log: list[Answer] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                answer = Answer(self.path, dict(self.headers))
                owner.log.append(answer)
                served = owner.paths.get(self.path.partition("?")[0])
                owner.answer(self, served, answer)

            def log_message(self, *args: object) -> None:
                """Say nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> "Server":
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Nothing answers any more."""
        self.http.shutdown()
        self.http.server_close()

    @property
    def sent(self) -> int:
        """Bytes of all bodies."""
        return sum(answer.sent for answer in self.log)

    @property
    def statuses(self) -> list[int]:
        return [answer.status for answer in self.log]

    def answer(self, handler: BaseHTTPRequestHandler, served: Served | None, answer: Answer) -> None:
        """Send one answer, and write down what it was before it is sent: who asked may look at once."""
        if served is None:
            return _plain(handler, answer, 404)
        if served.statuses:
            return _plain(handler, answer, served.statuses.pop(0))
        if served.to:
            return _plain(handler, answer, served.code, {"Location": served.to})
        asked, start, status = handler.headers, 0, 200
        unchanged = (served.tag and asked.get("If-None-Match") == served.tag) or (
            served.modified and asked.get("If-Modified-Since") == served.modified
        )
        if unchanged:
            return _plain(handler, answer, 304)
        fits = not served.conditions or asked.get("If-Range") in (None, served.tag, served.modified)
        if "Range" in asked and served.ranges and fits:
            start, status = int(asked["Range"].removeprefix("bytes=").rstrip("-")), 206
            if start >= len(served.body):
                return _plain(handler, answer, 416)
        body = served.body[start:]
        handler.send_response(status)
        if served.length:
            handler.send_header("Content-Length", str(len(body)))
        else:
            handler.send_header("Connection", "close")
        if status == 206:
            handler.send_header("Content-Range", f"bytes {start}-{len(served.body) - 1}/{len(served.body)}")
        for name, value in {"ETag": served.tag, "Last-Modified": served.modified, **served.headers}.items():
            if value:
                handler.send_header(name, value)
        answer.status = status
        handler.end_headers()
        if served.cuts:
            body = body[: served.cuts.pop(0)]
            handler.close_connection = True
        if not served.length:
            handler.close_connection = True
        for at in range(0, len(body), served.block):
            answer.sent += len(body[at : at + served.block])
            try:
                handler.wfile.write(body[at : at + served.block])
                handler.wfile.flush()
            except OSError:  # nobody reads any more
                break
            time.sleep(served.pause)


def _plain(handler: BaseHTTPRequestHandler, answer: Answer, status: int, headers: dict[str, str] | None = None) -> None:
    answer.status = status
    handler.send_response(status)
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    if status != 304:
        handler.send_header("Content-Length", "0")
    handler.end_headers()


@contextmanager
def serving(**paths: Served) -> Iterator[Server]:
    """A server of ``/NAME.safetensors`` for each keyword."""
    with Server(**{f"/{name}.safetensors": served for name, served in paths.items()}) as server:
        yield server
