"""The server's process: where it listens, and how it ends."""

import gc
import signal
import socket
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import ConfigError
from ..numerics import collector_passes_over
from .book import read_book
from .settings import ServeOptions

if TYPE_CHECKING:
    import uvicorn

    from .app import Service


def serve(path: str | Path, options: ServeOptions, keep_going: bool = False) -> None:
    """Serve a book over HTTP until SIGTERM or Ctrl-C; what was accepted is answered before it ends.

    Args:
        path: of the book.
        options: limits and sizes.
        keep_going: start although some tasks' files cannot be served; these answer with status 503.

    Raises:
        ConfigError: the book, a missing package, an address that cannot be listened at; nothing was started.
    """
    check_packages()
    device = device_of(options)
    listening = listen(options)
    try:
        book = read_book(path, memory=options.memory_bytes, keep_going=keep_going)
        for entry in book.entries.values():
            if entry.error is not None:
                print(f"not served: tasks.{entry.name}: {entry.error}", flush=True)
        from .app import Service

        service = Service(book, options, device)
        try:
            with _settled():
                server_of(service, listening).run(sockets=[listening])
        finally:
            service.close()
    finally:
        listening.close()


@contextmanager
def _settled() -> Iterator[None]:
    """Python's collector passes over what is there now: looking through torch's objects would hold every request.

    A full collection took about 0.35 s of CPU time with a small ViT, nearly all of it for what torch and timm had brought.
    """
    gc.collect()
    with collector_passes_over():
        yield


def check_packages() -> None:
    """Raises ConfigError: a package of the extra is missing."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f'serving over HTTP needs {error.name}: pip install "vpeft[serve]"') from error


def device_of(options: ServeOptions) -> str:
    """The device that the options name, or the GPU where there is one.

    Raises:
        ConfigError: it is not there.
    """
    if not options.device:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device: {options.device} is not there: {str(error).splitlines()[0]}") from error
    return options.device


def listen(options: ServeOptions) -> socket.socket:
    """A socket at the options' host and port.

    Raises:
        ConfigError: there is no such address, or another program has it.
    """
    try:
        found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = found[0]
        made = socket.create_server(address[:2], family=family, backlog=2048)
        # Connections inherit it; asyncio sets it only where the socket names its protocol. Without it the second part of
        # an answer waits 40 ms for the first one's acknowledgement.
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made
    except OSError as error:
        text = error.strerror or str(error)
        raise ConfigError(f"--host, --port: cannot listen at {options.host}:{options.port}: {text}") from error


def server_of(service: "Service", listening: socket.socket) -> "uvicorn.Server":
    """uvicorn's server around a service; ``run(sockets=[listening])`` runs it, ``handle_exit`` ends it in order."""
    import uvicorn

    from .app import create_app

    class Server(uvicorn.Server):
        """Says where it listens, and leaves signals as they were before it."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        def handle_exit(self, sig: int, frame: types.FrameType | None) -> None:
            self.force_exit = self.should_exit  # asked for twice
            self.should_exit = service.closing = True

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                host, port, *_ = listening.getsockname()
                where = f"[{host}]" if ":" in host else host
                print(f"{len(service.book.entries)} tasks at http://{where}:{port}", flush=True)

    seconds = 2 * service.options.timeout + 5  # a body that is still coming, and then its answer
    return Server(
        uvicorn.Config(
            create_app(service), log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=int(seconds)
        )
    )
