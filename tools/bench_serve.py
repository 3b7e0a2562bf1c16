#!/usr/bin/env python
"""Load test of ``vpeft serve``: requests per second and latencies on 8 tasks, beside one request in each forward.

Makes eight checkpoints of eight methods on the embedded ViT (random values and classifiers), starts the server in a process
of its own on loopback, and prints tables in Markdown. Every answer is compared with the forward that the image has for
itself. Takes about three minutes on two quiet cores: ``python tools/bench_serve.py --out runs/bench_serve``.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

import vpeft
from vpeft import checkpoint
from vpeft.data.images import open_image
from vpeft.engine.predict import config_of
from vpeft.tasks.registry import get_task
from vpeft.tasks.restore import restored

BACKBONE = "vit_micro_patch4_28.vpeft_fashion"
METHODS = ("lora", "adaptformer", "ssf", "vpt_deep", "convpass", "bitfit", "fact_tt", "dora")
CLASSES = (10, 5, 20, 3, 100, 10, 7, 12)
TOLERANCE = 1e-5
Answer = list[dict[str, Any]]


# ---- tasks, images, and what is right ----


def make_tasks(folder: Path) -> Path:
    """Eight checkpoints and their book."""
    tasks = {}
    for seed, (method, classes) in enumerate(zip(METHODS, CLASSES, strict=True)):
        torch.manual_seed(seed)
        model = timm.create_model(BACKBONE, pretrained=True, num_classes=classes).eval()
        handle = vpeft.attach(model, method)
        with torch.no_grad():
            for _, p in handle.named_parameters():
                p.add_(0.02 * torch.randn_like(p))
            for _, p in handle.head_parameters():
                nn.init.normal_(p, std=0.3)
        tasks[method] = f"{method}.safetensors"
        handle.save(folder / tasks[method], class_names=[f"{method} {i}" for i in range(classes)])
    book = folder / "tasks.json"
    book.write_text(json.dumps({"tasks": tasks}, indent=1))
    return book


def make_images(folder: Path, count: int) -> list[bytes]:
    """PNG files of random pixels, of several sizes."""
    rng, found = np.random.default_rng(0), []
    for i in range(count):
        path = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (28 + i % 5, 28 + i % 7, 3), np.uint8)).save(path)
        found.append(path.read_bytes())
    return found


@torch.inference_mode()
def separate(folder: Path, count: int) -> dict[str, list[Answer]]:
    """What each task says of each image in a forward of its own, each task on a model of its own."""
    found = {}
    for method in METHODS:
        file = checkpoint.read(folder / f"{method}.safetensors")
        task = get_task(config_of(file))
        built, prepare = restored(task, file), task.input_of(file)
        found[method] = []
        for i in range(count):
            image = prepare(open_image(folder / f"{i}.png"))[None].to(built.device)
            found[method].append(task.answer(file, task.scores(built.model, image)[0])["classes"])
    return found


def is_right(found: Answer, truth: Answer) -> bool:
    """The same classes with the same probabilities to 1e-5, the same best one but for a tie."""
    a, b = ({c["class"]: c["probability"] for c in row} for row in (found, truth))
    if len(found) != len(truth) or max((abs(a[n] - b[n]) for n in a.keys() & b.keys()), default=1) > TOLERANCE:
        return False
    best, right = found[0], truth[0]
    return best["class"] == right["class"] or abs(best["probability"] - right["probability"]) <= TOLERANCE


# ---- clients ----


@dataclass
class Load:
    """What is sent, and what came of it.

    Attributes:
        port: of the server.
        images: their bytes.
        truth: by task and image.
        seconds: of each right or wrong answer.
        wrong: answers that are not those of a forward of their own, and statuses that were not due.
        hung_up: requests whose client went away without waiting.
        broken: broken images that were refused as such.
    """

    port: int
    images: list[bytes]
    truth: dict[str, list[Answer]]
    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    hung_up: int = 0
    broken: int = 0


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, task: str, data: bytes) -> tuple[int, dict]:
    """One request on a connection that stays."""
    send(writer, task, data)
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = int(head.split("content-length:")[1].split("\r\n")[0])
    return int(head.split(" ", 2)[1]), json.loads(await reader.readexactly(length))


def send(writer: asyncio.StreamWriter, task: str, data: bytes, part: int | None = None) -> None:
    head = f"POST /predict?task={task} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data[:part])


async def client(load: Load, rng: random.Random, more: Any, odd: float) -> None:
    """Ask one request after the other while ``more()``; of ``odd`` hang up, and of as many send a broken image."""
    reader, writer = await asyncio.open_connection("127.0.0.1", load.port)
    while more():
        task, image = rng.choice(METHODS), rng.randrange(len(load.images))
        data, dice = load.images[image], rng.random()
        if dice < odd:  # in the middle of the request, or of the answer
            send(writer, task, data, rng.choice((None, len(data) // 2)))
            await asyncio.sleep(rng.random() * 0.02)
            writer.close()
            load.hung_up += 1
            reader, writer = await asyncio.open_connection("127.0.0.1", load.port)
        elif dice < 2 * odd:
            status, answer = await ask(reader, writer, task, data[: len(data) // 2])
            load.broken += status in (400, 415)
            if status not in (400, 415):
                load.wrong.append(f"broken image: {status} {answer}")
        else:
            start = time.perf_counter()
            status, answer = await ask(reader, writer, task, data)
            load.seconds.append(time.perf_counter() - start)
            if status != 200 or answer["task"] != task or not is_right(answer["classes"], load.truth[task][image]):
                load.wrong.append(f"{task}, image {image}: {status} {answer}")
    writer.close()


async def timed(load: Load, clients: int, seconds: float) -> float:
    """Requests per second of so many clients, after a second that does not count."""
    begin = time.perf_counter() + 1
    rngs = [random.Random(n) for n in range(clients)]
    warm = Load(load.port, load.images, load.truth)
    await asyncio.gather(*(client(warm, r, lambda: time.perf_counter() < begin, 0) for r in rngs))
    load.wrong += warm.wrong
    start = time.perf_counter()
    await asyncio.gather(*(client(load, r, lambda: time.perf_counter() < start + seconds, 0) for r in rngs))
    return len(load.seconds) / (time.perf_counter() - start)


async def counted(load: Load, clients: int, requests: int) -> None:
    """So many answers that are compared, between clients that hang up and broken images (5 percent each)."""
    await asyncio.gather(
        *(client(load, random.Random(n), lambda: len(load.seconds) < requests, 0.05) for n in range(clients))
    )


# ---- the server ----


@contextlib.contextmanager
def server(book: Path, *arguments: str):
    """The port of ``vpeft serve`` in a process of its own."""
    command = [sys.executable, "-m", "vpeft.cli", "serve", "--book", str(book), "--port", "0", *arguments]
    root = str(Path(__file__).resolve().parents[1])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    try:
        line = process.stdout.readline()
        if " tasks at http" not in line:
            raise SystemExit(f"the server did not start: {line}")
        yield int(line.rsplit(":", 1)[1])
    finally:
        process.send_signal(signal.SIGTERM)
        if process.wait(60):
            print(f"the server ended with status {process.returncode}", file=sys.stderr)


async def metrics(port: int) -> dict[str, float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    lines = (await reader.read()).decode().splitlines()
    writer.close()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vpeft_")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/bench_serve", metavar="DIR", help="for checkpoints, images and the tables")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=8, help="of each number")
    parser.add_argument("--requests", type=int, default=10_000, help="compared ones among clients that hang up")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1, help="torch's, of the server")
    parser.add_argument("--window-ms", type=float, default=3.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    book, images = make_tasks(folder), make_images(folder, args.images)
    truth = separate(folder, args.images)
    lines = [
        f"{len(METHODS)} tasks on {BACKBONE}, {os.cpu_count()} cores for server and clients, {args.threads} thread(s) of "
        f"torch, window {args.window_ms:g} ms, torch {torch.__version__}, load before: {os.getloadavg()[0]:.1f}",
        "",
        "| clients | server | requests/s | 50th percentile, ms | 99th, ms | images in a batch | wrong |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    common, wrong = ["--threads", str(args.threads)], []
    settings = {"batches": ["--window-ms", str(args.window_ms)], "one request, one forward": ["--max-batch", "1"]}
    print(*lines, sep="\n")
    for title, arguments in settings.items():
        with server(book, *common, *arguments) as port:
            for clients in args.clients:
                load, before = Load(port, images, truth), asyncio.run(metrics(port))
                rate, after = asyncio.run(timed(load, clients, args.seconds)), asyncio.run(metrics(port))
                size, number = (after[f"vpeft_batch_size_{k}"] - before[f"vpeft_batch_size_{k}"] for k in ("sum", "count"))
                low, high = (1000 * np.percentile(load.seconds, q) for q in (50, 99))
                wrong += load.wrong
                cells = (clients, title, f"{rate:.0f}", f"{low:.1f}", f"{high:.1f}", f"{size / number:.1f}", len(load.wrong))
                lines.append(f"| {' | '.join(map(str, cells))} |")
                print(lines[-1], flush=True)
            if title == "batches":
                odd, start = Load(port, images, truth), time.perf_counter()
                asyncio.run(counted(odd, max(args.clients), args.requests))
                wrong += odd.wrong
                note = (
                    f"Among {odd.hung_up} requests whose client hung up and {odd.broken} broken images, "
                    f"{max(args.clients)} clients: {len(odd.wrong)} wrong of {len(odd.seconds)} answers, each compared with "
                    f"its separate forward (probabilities to {TOLERANCE:g}, best class), in "
                    f"{time.perf_counter() - start:.0f} s."
                )
    lines += ["", note]
    print("", note, *(["", "wrong:", *wrong[:5]] if wrong else []), sep="\n")
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
