"""A composition: a small file that names the files of several adapters, how others are made of them, and which act."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor, nn

from .. import checkpoint
from ..attached.tree import Tree
from ..errors import CheckpointError, MethodError, shown
from ..fetching import is_source
from ..files import existing_file, naming, parse_json, sha256_of, writable_file, write_text
from ..metadata import SavedModel
from ..options import check_values, option
from .active import Activated, activate, active
from .attaching import check_arguments
from .averaging import AVERAGE, Recipe, average, combine, make
from .container import Container, container_of, originals_of
from .handle import Handle
from .loading import load

KIND, FORMAT = "vpeft composition", 1
_LARGEST = 16 * 2**20  # bytes: of tens of thousands of parts
_MOST = 10**5
_NAME = {"pattern": r"[^\W\d]\w{0,99}", "free": "letters, digits and underscores"}
_SHA = {"pattern": "[0-9a-f]{64}", "free": "a SHA-256"}


@dataclass
class FilePart:
    """One adapter's file: its path from the composition's folder, with ``/``, and the checksum of its bytes."""

    name: str = option("", **_NAME)
    file: str = option("", pattern=".+", free="a path")
    sha256: str = option("", **_SHA)


@dataclass
class MadePart:
    """One adapter that is made of others; see ``Recipe``."""

    name: str = option("", **_NAME)
    by: str = option("", choices=("average", "combine"))
    of: list[str] = option([], length=(1, _MOST), **_NAME)
    weights: list[float] = option([], length=(1, _MOST))
    mode: str = option("", choices=("tensors", "exact"))
    head: str | None = option(None, **_NAME)


@dataclass
class Composition:
    """All that the file holds, but for its own checksum.

    ``active`` are the handles that act, in their order, and ``head`` whose classifier is in the model; ``fingerprint`` is
    of the backbone, where there was one, and ``model`` beside it then a ``SavedModel``.
    """

    kind: str = option("", choices=(KIND,))
    format: int = option(FORMAT, ge=1, le=FORMAT, unit="format")
    parts: list[FilePart] = option([])
    made: list[MadePart] = option([])
    active: list[str] = option([], length=(0, _MOST), **_NAME)
    head: str | None = option(None, **_NAME)
    fingerprint: str | None = option(None, **_SHA)


def save_composition(model: nn.Module | None, path: str | Path, files: Mapping[str, str | Path]) -> Path:
    """Write which adapters stand together on a model: a JSON file that names their files by checksum.

    A handle that ``average`` or ``combine`` made needs no file: how it was made is written, where that still gives the
    values it has. Without a model the file is a mere list of tasks (``active`` is empty).

    Args:
        model: with methods attached; None for a list of files.
        path: of the composition, ``*.json``.
        files: the file of each handle, which ``handle.save`` wrote; in the composition's folder or below it, so that both
            can be moved together.

    Raises:
        CheckpointError: a file that is missing, damaged or elsewhere, that holds other values than the handle of its name
            has now, or a handle without one; nothing was written.
        MethodError: a method is merged into the weights.
    """
    path = writable_file(path)
    with naming(path):
        if not isinstance(files, Mapping) or not all(isinstance(name, str) for name in files):
            raise CheckpointError(f"files: expected a mapping of names to files, got {shown(files)}")
        parts = [_part(path, name, file) for name, file in files.items()]
        _check_own_place(path, files)
        content: dict[str, Any] = {"kind": KIND, "format": FORMAT, "parts": parts, "made": [], "active": [], "head": None}
        content |= {"model": None, "fingerprint": None}
        if model is not None:
            content |= _described(model, path, parts)
        _check(content)
    write_text(path, json.dumps({**content, "sha256": _checksum(content)}, indent=1, allow_nan=False) + "\n")
    return path


def load_composition(
    model: nn.Module,
    path: str | Path,
    *,
    heads: Mapping[str, Mapping[str, nn.Module]] | None = None,
    check_backbone: bool = True,
) -> dict[str, Handle]:
    """Attach all adapters of a composition, make those that are made of others, and let the active ones act.

    All else that is attached is disabled; where the composition is a list of tasks, so are the new ones: ``activate`` one.

    Args:
        model: a fresh model with the backbone weights that they were trained on.
        path: a file that ``save_composition`` wrote.
        heads: modules outside the model, by the handle's name and then as ``load`` takes them.
        check_backbone: compare the frozen weights with those they were trained on.

    Returns:
        The handles by name, in the order in which they were attached.

    Raises:
        CheckpointError: damaged, foreign, made for another backbone; a part that is missing, changed or outside of the
            folder; a name that is taken. Names the file. The model and its other handles are then as they were.
        UnsupportedModelError: a wrapper around a model.
    """
    check_arguments(model, None, None)
    path = _own_file(path)
    heads = {} if heads is None else heads
    if not isinstance(heads, Mapping):
        raise MethodError(f"heads: expected modules by the handles' names, got {shown(heads)}")
    with naming(path):
        content = _read(path)
        files = {part["name"]: _verified(path, part) for part in content["parts"]}
        names = [*files, *(made["name"] for made in content["made"])]
        _check_fits(model, content, names, heads, check_backbone)
    before, found = Activated(model, single=False), {}
    try:
        for name, file in files.items():
            found[name] = load(model, file, name=name, heads=heads.get(name), check_backbone=check_backbone)
        with naming(path):
            for made in content["made"]:
                found[made["name"]] = _remade(found, made)
            activate(model, content["active"], head=content["head"])
    except BaseException:
        for handle in reversed(found.values()):
            handle.detach()
        before.restore()
        raise
    return found


def files_of(path: str | Path) -> dict[str, Path]:
    """The files that a composition names, by the handles' names; each is the one that it was written with.

    Raises:
        CheckpointError: as ``load_composition``; or it is no mere list of files: something is made of others, or acts.
    """
    path = _own_file(path)
    with naming(path):
        content = _read(path)
        for key, what in (("made", "it makes handles of others"), ("active", "handles act together in it")):
            if content[key]:
                raise CheckpointError(f"{what}; a list of tasks is written by save_composition(None, …)")
        return {part["name"]: _verified(path, part) for part in content["parts"]}


# ---- what is written ----


def _described(model: nn.Module, path: Path, parts: list[dict[str, str]]) -> dict[str, Any]:
    """What the handles of a model add to a list of files; each is compared with its file."""
    check_arguments(model, None, None)
    container = container_of(model)
    trees: dict[str, Tree] = {} if container is None else container.trees
    files = {part["name"]: path.parent / part["file"] for part in parts}
    lost = [name for name in files if name not in trees]
    if lost:
        raise CheckpointError(f"files: no handle of the model is called {shown(lost[0])}; attached: {', '.join(trees)}")
    for name, tree in trees.items():
        if tree.unmerged is not None:
            raise MethodError(f"'{name}' is merged into the weights; unmerge() before saving")
    for name, file in files.items():
        _check_same(trees[name], file)
    made = [_recipe(model, name, trees, files) for name in trees if name not in files]
    acting = active(model)
    shown_head = container.enabled_order[-1] if acting and container is not None else None
    return {
        "made": made,
        "active": acting,
        "head": shown_head,
        "model": checkpoint.model_metadata(model),
        "fingerprint": _fingerprint(model),
    }


def _fingerprint(model: nn.Module) -> str:
    """Of the bare model, whatever methods did to its own tensors."""
    container = container_of(model)
    return checkpoint.fingerprint(model, (), originals_of(container.trees.values() if container is not None else ()))


def _own_file(path: str | Path) -> Path:
    """A composition's file, which names others beside it, and so is on this machine."""
    if is_source(path):
        raise CheckpointError(f"{shown(path)}: a composition is on this machine, with its parts; adapters: vpeft.load")
    return existing_file(path)


def _part(path: Path, name: str, file: str | Path) -> dict[str, str]:
    """A file as the composition names it."""
    if is_source(file):
        raise CheckpointError(
            f"files: {shown(file)} of '{name}' must lie in the composition's folder: download it there first"
        )
    file = existing_file(file)
    folder = path.parent.resolve()
    whole = file.parent.resolve() / file.name  # a link is taken as where it stands
    if not whole.is_relative_to(folder):
        raise CheckpointError(f"files: {file} of '{name}' is not in the composition's folder or below it; put it there")
    given = whole.relative_to(folder).as_posix()
    if _leads_out(given):
        raise CheckpointError(f"files: {shown(given)} of '{name}' is no path on every system; rename it, without \\ and :")
    checkpoint.read(file)
    return {"name": name, "file": given, "sha256": sha256_of(file)}


def _check_own_place(path: Path, files: Mapping[str, str | Path]) -> None:
    """Refuse to write the composition over one of its parts."""
    for name, file in files.items():
        if path.exists() and path.samefile(file):
            raise CheckpointError(f"this is the file of '{name}', which would be lost; give the composition another path")


def _leads_out(given: str) -> bool:
    """Whether a path may stand for another place than one in the composition's folder, on some system."""
    pure = PurePosixPath(given)
    return pure.is_absolute() or ".." in pure.parts or "\\" in given or ":" in given or "\0" in given


def _check_same(tree: Tree, path: Path) -> None:
    """Refuse a handle that has not the values of its file."""
    file = checkpoint.read(path)
    for method, state in (tree.method.exported(tree), (tree.method, tree.state())):
        values = state | tree.head_tensors()
        if method.name == file.metadata["method"]["name"] and _same(values, file.tensors):
            return
    raise CheckpointError(f"'{tree.name}' has other values than {path}; save it again: handle.save({str(path)!r})")


def _same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    if one.keys() != two.keys():
        return False
    return all(_equal(one[n].detach().cpu(), two[n].detach().cpu().to(one[n].dtype)) for n in one)


def _equal(one: Tensor, two: Tensor) -> bool:
    """Entry by entry; what is no number is equal to itself."""
    return one.shape == two.shape and bool(((one == two) | ((one != one) & (two != two))).all())


def _recipe(model: nn.Module, name: str, trees: Mapping[str, Tree], files: Mapping[str, Path]) -> dict[str, Any]:
    """How a handle is made, where that still gives its values."""
    tree = trees[name]
    recipe: Recipe | None = tree.recipe
    advice = f"save it, and give its file: files={{'{name}': …}}; or detach it"
    if recipe is None or tree.heads:
        raise CheckpointError(f"'{name}' has no file; {advice}")
    here = list(trees)
    gone = [other for other in recipe.of if other not in trees or here.index(other) > here.index(name)]
    if gone:
        raise CheckpointError(f"'{name}' was made of '{gone[0]}', which is not attached any more; {advice}")
    try:
        made = make([Handle(model, other) for other in recipe.of], recipe)
    except MethodError:
        made = None
    if made is None or not _same(tree.state() | tree.head_tensors(), made.state | made.head):
        raise CheckpointError(f"'{name}' has other values than {recipe.by} of {', '.join(recipe.of)} gives now; {advice}")
    return {
        "name": name, "by": recipe.by, "of": list(recipe.of), "weights": list(recipe.weights), "mode": recipe.mode,
        "head": recipe.head,
    }  # fmt: skip


# ---- what is read ----


def _read(path: Path) -> dict[str, Any]:
    """The content of a composition, checked as a whole."""
    if path.stat().st_size > _LARGEST:
        raise CheckpointError(f"{path} is no composition: it is larger than {_LARGEST // 2**20} MB")
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or no composition (an adapter's own file is read by vpeft.load): {error}"
        ) from error
    found = parse_json(text, path)
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise CheckpointError(f"{path} is no composition; an adapter's own file is read by vpeft.load")
    written = found.get("format")
    if type(written) is int and written != FORMAT:
        raise CheckpointError(f"{path} has format {shown(written)}; this version of vpeft reads {FORMAT}")
    content = {key: value for key, value in found.items() if key != "sha256"}
    if found.get("sha256") != _checksum(content):
        raise CheckpointError(f"{path} is damaged or was changed by hand: write it by vpeft.save_composition")
    _check(content)
    return content


def _check(content: Mapping[str, Any]) -> None:
    """Refuse what does not fit the schema, or itself."""
    check_values(Composition, content, CheckpointError)
    if (content["fingerprint"] is None) != (content.get("model") is None):
        raise CheckpointError("model and fingerprint belong together")
    if content["fingerprint"] is not None:
        check_values(SavedModel, content["model"], CheckpointError, "model.")
    seen: set[str] = set()
    for part in (*content["parts"], *content["made"]):
        name = part["name"]
        if name in seen:
            raise CheckpointError(f"two parts are called '{name}'")
        if Container.has_attribute(name):
            raise CheckpointError(f"'{name}' is an attribute of the module that holds attached methods; choose another")
        unknown = [other for other in part.get("of", ()) if other not in seen]
        if unknown:
            raise CheckpointError(f"'{name}' is made of '{unknown[0]}', which is no part before it")
        if "of" in part and not all(math.isfinite(weight) for weight in part["weights"]):
            raise CheckpointError(f"'{name}': weights must be finite")
        seen.add(name)
    _check_names(content["active"], seen, "active")
    last = content["head"]
    if (last is None) != (not content["active"]) or (last is not None and last not in content["active"]):
        raise CheckpointError(f"head: {shown(last)} is none of the active {', '.join(content['active']) or 'none'}")


def _check_names(names: Iterable[str], known: set[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name not in known or name in seen:
            raise CheckpointError(f"{what}: '{name}' {'stands there twice' if name in seen else 'is no part'}")
        seen.add(name)


def _verified(path: Path, part: Mapping[str, str]) -> Path:
    """The path of a part whose bytes are those that were there when the composition was written."""
    given = part["file"]
    if _leads_out(given):
        raise CheckpointError(f"'{part['name']}': {shown(given)} leads out of the composition's folder")
    file = path.parent / given
    try:
        found = sha256_of(existing_file(file))
    except CheckpointError as error:
        raise CheckpointError(f"'{part['name']}': {error}") from error
    if found != part["sha256"]:
        raise CheckpointError(
            f"'{part['name']}': {file} is another file than the composition was made with (its checksum differs)"
        )
    return file


def _check_fits(
    model: nn.Module, content: Mapping[str, Any], names: list[str], heads: Mapping[str, Any], check_backbone: bool
) -> None:
    container = container_of(model)
    taken = [name for name in names if container is not None and name in container.trees]
    if taken:
        raise CheckpointError(f"'{taken[0]}' is attached already; detach it first")
    unknown = [name for name in heads if name not in names]
    if unknown:
        raise CheckpointError(f"heads: {shown(unknown[0])} is no part; parts: {', '.join(names)}")
    if not (check_backbone and content["fingerprint"]) or _fingerprint(model) == content["fingerprint"]:
        return
    was, here = ((m["name"] or m["class"]) for m in (content["model"], checkpoint.model_metadata(model)))
    reason = f"it was made on {was}, this model is {here}"
    if was == here:
        reason = f"this {here} has other frozen weights (another pretrained tag, input size, dtype, or random ones)"
    raise CheckpointError(f"made for another backbone: {reason}")


def _remade(found: Mapping[str, Handle], made: Mapping[str, Any]) -> Handle:
    handles = [found[name] for name in made["of"]]
    head = AVERAGE if made["head"] is None else found.get(made["head"], made["head"])
    if made["by"] == "average":
        return average(handles, made["weights"], mode=made["mode"], name=made["name"], head=head)
    return combine(handles, made["weights"], name=made["name"], head=head)


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
