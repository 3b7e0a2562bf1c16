"""A cache of frozen features: what lies below the first trained site is computed once and replayed in every epoch.

Which features those are, the attached handle says (``Handle.cache_needs``); no method is named here. Outputs of chosen
blocks (or the classifiers' inputs) are stored per sample. While the cache plays, the frozen modules below are not run: their
forwards give what was stored, or an empty tensor of the right shape where nobody reads it.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.hooks import RemovableHandle

from ..backbone.modules import FIRST, ModuleRef
from ..backbone.reading import input_size
from ..checkpoint import fingerprint
from ..data.broken import Failed, take, tally_of
from ..errors import UnsupportedModelError, VpeftError
from ..tuning.handle import Handle

INPUT = FIRST  # the key of the first block's input
GB = 1024**3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class CacheError(VpeftError):
    """Features that cannot be cached, or a cache that does not fit."""


class _Enough(Exception):
    """Everything that is stored was seen; the rest of a forward is not needed."""


def why_not(handle: Handle) -> str | None:
    """Why an attached method leaves nothing to cache, or None."""
    needs = handle.cache_needs
    if needs.image:
        return f"{handle.method.name} reads the image itself"
    if needs.first <= 0:
        return f"{handle.method.name} acts from {handle.boundary} on, so nothing frozen lies below it"
    try:
        _ = handle.sites.patch_embed  # where the stand-in images enter
    except UnsupportedModelError as error:
        return str(error)
    return None


class FeatureCache:
    """Stored features of one data set.

    Args:
        handle: the attached method.
        dtype: ``fp32``, ``bf16`` or ``fp16``, of what is stored; the forward gets the type it was computed in.
        mode: ``memory``, ``disk`` (memory-mapped files), or ``auto``: memory where the budget allows it, else disk.
        budget: bytes that may be kept in memory.
        folder: of caches on disk.
        autocast: makes the context that forwards run in.

    Raises:
        CacheError: nothing frozen lies below the first trained site.
    """

    def __init__(
        self,
        handle: Handle,
        *,
        dtype: str = "fp32",
        mode: str = "auto",
        budget: float = 4 * GB,
        folder: str | Path = "cache",
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        reason = why_not(handle)
        if reason:
            raise CacheError(f"no features to cache: {reason}")
        self.handle, self.model, self.cache_needs = handle, handle.model, handle.cache_needs
        self.dtype, self.mode, self.budget, self.folder = DTYPES[dtype], mode, budget, Path(folder)
        self.autocast = autocast
        blocks = handle.sites.blocks
        self.keys: list[Any] = sorted({*self.cache_needs.taps, self.cache_needs.first - 1})
        if self.cache_needs.heads_only:
            self.keys = [h.path for h in handle.sites.heads]
        self.patch_embed = handle.sites.patch_embed
        self.skipped: list[ModuleRef] = [self.patch_embed]
        for block in blocks[: self.cache_needs.first]:
            merging = handle.sites.merging_before(block)
            if merging is not None and block.index - 1 not in self.keys:  # else it runs, on stored tokens
                self.skipped.append(merging)
            self.skipped.append(block)
        self.features: dict[Any, Tensor] = {}
        self.labels = torch.empty(0, dtype=torch.long)
        self.readable = torch.empty(0, dtype=torch.bool)
        self.computed_in: dict[Any, torch.dtype] = {}
        self.shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self.where = "memory"

    # ---- filling ----

    def fill(self, loader: DataLoader, progress: bool = True) -> "FeatureCache":
        """Compute and store the features of every sample of the loader's data set, or open them where they are on disk.

        Raises:
            CacheError: they fit neither into the budget nor, where allowed, onto the disk; or a streamed data set.
        """
        if isinstance(loader.dataset, IterableDataset):
            raise CacheError("a streamed data set has no fixed samples whose features could be cached")
        total = len(loader.dataset)
        batches = self._in_order(loader)
        folder = None
        self.labels, self.readable = torch.zeros(total, dtype=torch.long), torch.zeros(total, dtype=torch.bool)
        for rows, images, labels in self._track(batches, total, progress):
            found = self._compute(images)
            if not self.readable.any():
                folder = self._allocate(found, total, loader)
                if folder is not None and self._opened(folder, found, total, loader):
                    return self
            for key, value in found.items():
                self.features[key][rows] = value.to(self.dtype).cpu()
            self.labels[rows], self.readable[rows] = labels, True
        if not self.readable.any():
            raise CacheError(f"not one of {total} samples can be read")
        if folder is not None:
            self._commit(folder)
        return self

    @staticmethod
    def _in_order(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Every sample that can be read, once, as (indices, images, labels), through the loader's data set."""
        size, total = loader.batch_sampler.batch_size, len(loader.dataset)
        tally = tally_of(loader.dataset.dataset)
        for start in range(0, total, size):
            items = {i: loader.dataset[0, i] for i in range(start, min(start + size, total))}
            kept = take(items.values(), tally)
            if kept:
                rows = torch.tensor([i for i, item in items.items() if not isinstance(item, Failed)])
                yield rows, torch.stack([x for x, _ in kept]), torch.tensor([int(y) for _, y in kept])

    def _track(self, batches: Iterator, total: int, progress: bool) -> Iterator:
        if not progress:
            yield from batches
            return
        from rich import get_console
        from rich.progress import Progress

        with Progress(transient=True, disable=not get_console().is_interactive) as bar:
            task = bar.add_task("caching frozen features", total=total)
            for rows, images, labels in batches:
                yield rows, images, labels
                bar.update(task, completed=int(rows[-1]) + 1)

    @torch.no_grad()
    def _compute(self, images: Tensor) -> dict[Any, Tensor]:
        """The features of a batch, from the frozen modules alone."""
        found: dict[Any, Tensor] = {}
        hooks = self._listen(found)
        device = next(self.model.parameters()).device
        try:
            with self.autocast():
                self.model(images.to(device))
        except _Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        self.computed_in = {key: value.dtype for key, value in found.items()}
        return found

    def _listen(self, found: dict[Any, Tensor]) -> list[RemovableHandle]:
        """Hooks that put what is stored into ``found``, note the shapes of what is skipped, and end the forward."""
        blocks = self.handle.sites.blocks
        hooks = [place.module.register_forward_hook(partial(_note_shape, self.shapes, place.path)) for place in self.skipped]
        if self.cache_needs.heads_only:
            for head in self.handle.sites.heads:
                keep = partial(_keep_input, found, head.path)
                hooks.append(head.module.register_forward_pre_hook(keep, with_kwargs=True))
            return hooks
        for key in self.keys:
            if key == INPUT:
                keep = partial(_keep_input, found, INPUT)
                hooks.append(blocks[0].module.register_forward_pre_hook(keep, with_kwargs=True, prepend=True))
            else:
                hooks.append(blocks[key].module.register_forward_hook(partial(_keep_output, found, key), prepend=True))
        hooks.append(blocks[self.cache_needs.first - 1].module.register_forward_hook(_stop))
        return hooks

    # ---- storing ----

    def _allocate(self, found: dict[Any, Tensor], total: int, loader: DataLoader) -> Path | None:
        """Room for the features; the folder they are written to, where they go to disk."""
        size = sum(math.prod(v.shape[1:]) * total * self.dtype.itemsize for v in found.values())
        if self.mode == "memory" and size > self.budget:
            raise CacheError(
                f"the features of {total:,} samples take {size / GB:.2f} GB, more than {self.budget / GB:.2f} GB; "
                "raise cache.budget_gb, store fewer bits (cache.dtype), or set cache.mode=disk"
            )
        if self.mode == "memory" or (self.mode == "auto" and size <= self.budget):
            self.features = {k: torch.empty(total, *v.shape[1:], dtype=self.dtype) for k, v in found.items()}
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if size > 0.9 * free:
            raise CacheError(
                f"the features of {total:,} samples take {size / GB:.2f} GB; {self.folder} has {free / GB:.2f} GB free"
            )
        self.where = "disk"
        return self.folder / self.fingerprint(loader)

    def _map(self, folder: Path, found: dict[Any, Tensor], total: int) -> dict[Any, Tensor]:
        maps = {}
        for number, (key, value) in enumerate(found.items()):
            shape = (total, *value.shape[1:])
            file = str(folder / f"features{number}.bin")
            maps[key] = torch.from_file(file, shared=True, size=math.prod(shape), dtype=self.dtype).view(shape)
        return maps

    def _opened(self, folder: Path, found: dict[Any, Tensor], total: int, loader: DataLoader) -> bool:
        """Open a finished cache; else make the files of a new one, under a name that is never trusted."""
        index = folder / "about.json"
        if index.is_file():
            self.features = self._map(folder, found, total)
            about = json.loads(index.read_text())
            self.labels = torch.tensor(about["labels"], dtype=torch.long)
            self.readable = torch.ones(total, dtype=torch.bool)
            self.readable[about.get("left_out", [])] = False
            return True
        partial = self._partial(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        self.features = self._map(partial, found, total)
        return False

    @property
    def size(self) -> int:
        """Bytes stored."""
        return sum(v.numel() * v.dtype.itemsize for v in self.features.values())

    @staticmethod
    def _partial(folder: Path) -> Path:
        return folder.with_name(f"{folder.name}.partial-{os.getpid()}")

    def _commit(self, folder: Path) -> None:
        partial = self._partial(folder)
        left_out = torch.nonzero(~self.readable).flatten().tolist()
        (partial / "about.json").write_text(json.dumps({"labels": self.labels.tolist(), "left_out": left_out}))
        os.replace(partial, folder)

    def fingerprint(self, loader: DataLoader) -> str:
        """What the features depend on: frozen weights, what is stored, precision, and every transformed sample."""
        method = self.handle.method
        digest = hashlib.sha256(fingerprint(self.model, self.handle.state_dict().keys()).encode())
        precision = {str(k): str(v) for k, v in self.computed_in.items()}
        facts = [self.keys, str(self.dtype), precision, method.name, method.options()]
        digest.update(json.dumps(facts, default=str).encode())
        expected = 0
        for rows, images, labels in self._in_order(loader):
            digest.update(images.numpy().tobytes())
            digest.update(labels.numpy().tobytes())
            if int(rows[0]) != expected or int(rows[-1]) - expected + 1 != len(rows):  # some are left out
                digest.update(rows.numpy().tobytes())
            expected = int(rows[-1]) + 1
        if expected != len(loader.dataset):
            digest.update(str(len(loader.dataset)).encode())
        return digest.hexdigest()[:32]

    # ---- playing ----

    def loader(self, loader: DataLoader) -> "CachedLoader":
        """The loader's batches with features in the place of images; the model must be called on what it yields."""
        return CachedLoader(loader, self)


def _note_shape(shapes: dict, path: str, module: nn.Module, args: tuple, output: Tensor) -> None:
    shapes[path] = (output.shape[1:], output.dtype)


def _keep_output(found: dict[Any, Tensor], key: Any, module: nn.Module, args: tuple, output: Tensor) -> None:
    found[key] = output.detach()


def _keep_input(found: dict[Any, Tensor], key: Any, module: nn.Module, args: tuple, kwargs: dict) -> None:
    found[key] = (args[0] if args else kwargs["x"]).detach()


def _stop(module: nn.Module, args: tuple, output: Tensor) -> None:
    raise _Enough


class CachedLoader:
    """Batches (stand-in images, labels) in the order of a ``DataLoader``; while it is gone through, the cache plays.

    A stand-in image holds nothing but its row in the batch, by which the cache finds the sample's features again: so a
    batch may be cut into parts or run twice.
    """

    def __init__(self, loader: DataLoader, cache: FeatureCache):
        self.dataset, self.batch_sampler, self.cache = loader.dataset, loader.batch_sampler, cache

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        cache, size = self.cache, input_size(self.cache.model)
        device = next(cache.model.parameters()).device
        player = _Player(cache)
        # A DataLoader draws a seed for its workers here; without it a method's dropout would draw other numbers.
        torch.empty((), dtype=torch.int64).random_()
        try:
            player.install()
            for items in self.batch_sampler:
                index = torch.tensor([i for _, i in items])
                index = index[cache.readable[index]]
                if not len(index):
                    continue
                player.features = {
                    k: v[index].to(device, cache.computed_in[k], non_blocking=True) for k, v in cache.features.items()
                }
                rows = torch.arange(len(index), device=device, dtype=torch.float32)
                yield rows.view(-1, 1, 1, 1).expand(-1, *size), cache.labels[index]
        finally:
            player.uninstall()


class _Player:
    """Puts stored features where the frozen modules would compute them."""

    def __init__(self, cache: FeatureCache):
        self.cache, self.features, self.rows = cache, {}, torch.empty(0)
        self.hooks: list[Any] = []
        self.replaced: list[nn.Module] = []

    def install(self) -> None:
        cache, sites = self.cache, self.cache.handle.sites
        numbers = {b.path: b.index for b in sites.blocks}
        for place in cache.skipped:
            self._replace(place.module, self._forward(place, numbers.get(place.path)))
        heads = sites.heads if cache.cache_needs.heads_only else []
        for head in heads:
            self.hooks.append(head.module.register_forward_pre_hook(self._feed(head.path), prepend=True))
        if INPUT in cache.keys:
            self.hooks.append(sites.blocks[0].module.register_forward_pre_hook(self._feed(INPUT), prepend=True))

    def uninstall(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for module in self.replaced:
            del module.forward
        self.hooks, self.replaced, self.features = [], [], {}

    def _replace(self, module: nn.Module, forward: Callable) -> None:
        if "forward" in vars(module):
            raise CacheError(f"{type(module).__name__}: its forward is replaced already")
        module.forward = forward
        self.replaced.append(module)

    def _forward(self, place: ModuleRef, block: int | None) -> Callable:
        patch_embed = place is self.cache.patch_embed
        shape, dtype = self.cache.shapes[place.path]

        def forward(x: Tensor, *args, **kwargs) -> Tensor:
            if patch_embed:
                self.rows = x[:, 0, 0, 0].long()
            if block in self.features:
                return self._chosen(block)
            return torch.zeros((), dtype=dtype, device=x.device).expand(len(x), *shape)

        return forward

    def _chosen(self, key: Any) -> Tensor:
        """The stored rows that the batch has; a whole batch in order needs no copy of them."""
        stored = self.features[key]
        if len(self.rows) == len(stored) and not self.rows.is_cuda and torch.equal(self.rows, torch.arange(len(stored))):
            return stored
        return stored[self.rows]

    def _feed(self, key: Any) -> Callable:
        def hook(module: nn.Module, args: tuple) -> tuple:
            return (self._chosen(key), *args[1:])

        return hook
