"""Prints a table of what each case on loopback takes: wall time, bytes that the server sent, what its answers were.

python -m tests.fetching.measure [--mb 8]
"""

import argparse
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.support.fake_hub import FakeHub
from tests.support.servers import Served, serving
from vpeft.errors import DownloadError
from vpeft.fetching import local_file
from vpeft.files import write_tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=float, default=8.0, help="of the file (default 8)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.safetensors"
        write_tensors(file, {"a": torch.randn(int(args.mb * 250_000))})
        os.environ["VPEFT_TIMEOUT"] = "1"
        print(f"A file of {file.stat().st_size:,} bytes.\n")
        print("| case | answers | bytes sent | seconds | result |\n|---|---|---:|---:|---|")
        cases(file.read_bytes(), Path(folder))


def cases(data: bytes, folder: Path) -> None:
    half, digest = len(data) // 2, hashlib.sha256(data).hexdigest()
    row("plain", Served(data), folder)
    row("again, unchanged", Served(data), folder, first=True)
    row("again, checksum known", Served(data), folder, first=True, behind=f"#sha256={digest}")
    row("again, server gone", Served(data), folder, first=True, gone=True)
    row("again, VPEFT_OFFLINE=1", Served(data), folder, first=True, offline=True)
    row("slow (40 blocks, 0.05 s between them)", Served(data, block=len(data) // 40, pause=0.05), folder)
    row("cut in the middle, ranges honoured", Served(data, cuts=[half]), folder)
    row("cut in the middle, ranges refused", Served(data, cuts=[half], ranges=False), folder)
    row("cut five times", Served(data, cuts=[len(data) // 6] * 5), folder)
    row("always truncated, ranges refused", Served(data, cuts=[half] * 9, ranges=False), folder)
    row("wrong checksum", Served(data), folder, behind=f"#sha256={'0' * 64}")
    row("404", Served(statuses=[404]), folder)
    row("503 twice, then there", Served(data, statuses=[503, 503]), folder)
    row("redirect", Served(to="/b.safetensors"), folder, more=Served(data))
    row("redirects in a circle", Served(to="/a.safetensors"), folder)
    row("says nothing (timeout 1 s)", Served(data, block=1, pause=30.0, etag=""), folder)
    row("four threads at once, checksum known", Served(data), folder, behind=f"#sha256={digest}", threads=4)
    on_the_hub(data, folder)


def row(
    name: str, served: Served, folder: Path, *, first: bool = False, gone: bool = False, offline: bool = False,
    behind: str = "", threads: int = 1, more: Served | None = None,
) -> None:  # fmt: skip
    with tempfile.TemporaryDirectory(dir=folder) as cache, serving(a=served, b=more or Served()) as server:
        os.environ["VPEFT_CACHE"] = cache
        address = f"{server.url}/a.safetensors{behind}"
        if first:
            local_file(address)
            server.log.clear()
        if gone:
            server.stop()
        os.environ["VPEFT_OFFLINE"] = "1" if offline else ""
        result, seconds = timed(lambda: at_once(address, threads))
        os.environ["VPEFT_OFFLINE"] = ""
        show(name, " ".join(map(str, server.statuses)), server.sent, seconds, result)


def at_once(address: str, count: int) -> None:
    if count == 1:
        local_file(address)
        return
    threads = [threading.Thread(target=local_file, args=(address,)) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def on_the_hub(data: bytes, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as home, FakeHub() as hub:
        os.environ.update(HF_ENDPOINT=hub.url, HF_HUB_CACHE=home)
        hub.put("ann/digits", a__safetensors=data)
        for name in ("hf://, first time", "hf://, again"):
            hub.log.clear()
            result, seconds = timed(lambda: local_file("hf://ann/digits/a.safetensors"))
            sent = len(data) * sum(method == "GET" for method, _, _ in hub.log)
            show(name, " ".join(method for method, _, _ in hub.log), sent, seconds, result)


def timed(call: Callable[[], object]) -> tuple[str, float]:
    started = time.perf_counter()
    try:
        call()
        result = "whole"
    except DownloadError as error:
        result = str(error).partition("safetensors")[2].partition(": ")[2] or str(error)
    return result, time.perf_counter() - started


def show(name: str, answers: str, sent: int, seconds: float, result: str) -> None:
    print(f"| {name} | {answers or 'none'} | {sent:,} | {seconds:.2f} | {result[:120]} |", flush=True)


if __name__ == "__main__":
    main()
