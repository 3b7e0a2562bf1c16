"""A book of tiny tasks on the embedded ViT, and clients for its server."""

import asyncio
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import timm
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

import vpeft
from tests.support.models import scatter
from vpeft.engine.config import from_container
from vpeft.engine.predict import predict
from vpeft.serving.app import Service, create_app
from vpeft.serving.book import read_book
from vpeft.serving.settings import ServeOptions
from vpeft.tasks.registry import get_task

BACKBONE = "vit_micro_patch4_28.vpeft_fashion"
METHODS = {"boots": "lora", "bags": "bitfit", "coats": "full"}  # the last one is not routed
SAN = {"width": 16, "depth": 4, "heads": 2, "queries": 4, "hidden": 8, "patch": 4, "tower_ratio": 0.5, "loss": {"points": 8}}


def save_task(path: Path, method: str = "lora", classes: int = 3, seed: int = 0, **options: Any) -> Path:
    """A checkpoint of a method with values of its own, and class names ``seed-0``, ``seed-1``, …"""
    torch.manual_seed(seed)
    model = timm.create_model(BACKBONE, pretrained=True, num_classes=classes).eval()
    handle = vpeft.attach(model, method, **options)
    with torch.no_grad():
        scatter(handle.named_parameters(), 0.02)
        for _, p in handle.head_parameters():
            nn.init.normal_(p, std=0.3)
    return handle.save(path, class_names=[f"{seed}-{i}" for i in range(classes)])


def save_masks(path: Path) -> Path:
    """A checkpoint of a segmentation task of two classes."""
    torch.manual_seed(14)
    config = from_container(
        {"task": "segmentation", "model": {"name": BACKBONE}, "method": {"name": "linear"},
         "seg": {"head": "san", "crop": 28, "options": SAN}}
    )  # fmt: skip
    task = get_task(config)
    built = task.assemble(task.build_backbone(0).eval(), 2)
    handle = vpeft.attach(built.backbone, "linear", heads=built.heads)
    with torch.no_grad():
        for _, p in handle.head_parameters():
            p.add_(2.0 * torch.randn_like(p))
    stats = {"mean": [0.3] * 3, "std": [0.3] * 3}
    return handle.save(path, class_names=["ground", "thing"], data=stats, config=OmegaConf.to_container(config))


def write_book(folder: Path, **tasks: Any) -> Path:
    path = folder / "book.json"
    path.write_text(json.dumps({"tasks": {n: str(t) if isinstance(t, Path) else t for n, t in tasks.items()}}))
    return path


def picture(seed: int = 0, size: tuple[int, int] = (28, 28), form: str = "PNG") -> bytes:
    """The bytes of an image file of random pixels; ``size`` is height and width."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


IMAGES = [picture(i, (28 + i % 3, 30)) for i in range(8)]


class Served:
    """A service and a client of it, in this process; ``async with Served(book) as served``."""

    def __init__(self, book: Path, **options: Any):
        self.service = Service(read_book(book, keep_going=options.pop("keep_going", False)), ServeOptions(**options))
        transport = httpx.ASGITransport(create_app(self.service), raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://here", timeout=60)

    async def __aenter__(self) -> "Served":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.client.aclose()
        await asyncio.to_thread(self.service.close)

    async def ask(self, task: str | None, data: bytes | None, **fields: Any) -> httpx.Response:
        """Upload an image as a form."""
        fields |= {} if task is None else {"task": task}
        files = None if data is None else {"image": ("x.png", data)}
        return await self.client.post("/predict", data=fields, files=files)

    def counted(self, name: str, **labels: str) -> float:
        """A number of the metrics; 0 where it was never counted."""
        return self.service.metrics.registry.get_sample_value(name, labels) or 0


def separate(ckpt: Path, images: Sequence[bytes], folder: Path) -> list[list[dict[str, Any]]]:
    """What ``vpeft predict`` says of each image by itself."""
    files = []
    for number, data in enumerate(images):
        files.append(folder / f"{number:04d}.png")
        files[-1].write_bytes(data)
    return [row["classes"] for row in predict(ckpt, files, batch_size=1, topk=None)]


def differ(one: Sequence[dict[str, Any]], two: Sequence[dict[str, Any]]) -> float:
    """The largest difference of two rankings' probabilities; infinite where the best class is another, not by a tie."""
    a, b = ({c["class"]: c["probability"] for c in row} for row in (one, two))
    tie = abs(one[0]["probability"] - b.get(one[0]["class"], 2)) < 1e-5
    if one[0]["class"] != two[0]["class"] and not tie:
        return float("inf")
    return max(abs(a[name] - b[name]) for name in a.keys() & b.keys())
