"""``vpeft export``: rebuild, merge where that is exact, write, compare with the model; only then is the file there."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ConfigError, MethodError, did_you_mean, shown
from ..fetching import is_source
from ..files import as_path, replacing, writing_folder
from ..tuning.handle import Handle
from . import folder as timm_folder
from . import programs
from .source import Exportable, acting, merge_all, of_checkpoint, of_handle

FORMATS = ("timm", "torch", "onnx")
MERGE = ("auto", "yes", "no")
# The largest difference that is let through, as a share of the largest output: rounding of another order of sums.
BOUND = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass
class Report:
    """What was written.

    Attributes:
        path: the file or folder.
        format: ``timm``, ``torch`` or ``onnx``.
        merged: whether the method is in the weights; else its hooks are in the program.
        differences: for each size of batch the largest difference from the model with its hooks, in the outputs' unit.
        largest: the largest output there.
    """

    path: Path
    format: str
    merged: bool
    differences: dict[int, float] = field(default_factory=dict)
    largest: float = 0.0

    def __str__(self) -> str:
        found = ", ".join(f"{d:.1e} at a batch of {b}" for b, d in self.differences.items())
        how = "merged" if self.merged else "with its hooks"
        exact = "; bit-identical to the merged model" if self.format == "timm" else ""
        return f"{self.path}: {self.format}, {how}; largest difference {found} (outputs up to {self.largest:.3g}){exact}"


def export(
    source: str | Path | Handle,
    out: str | Path,
    *,
    form: Literal["timm", "torch", "onnx"],
    merge: Literal["auto", "yes", "no"] = "auto",
    weights: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Report:
    """Write a model that runs without this library, and compare it with the original before it takes its place.

    ``torch`` and ``onnx`` hold the whole model of the task, for any number of inputs of one size, and their description
    (classes, preprocessing), which also stands in ``OUT.json``. ``timm`` is a folder with a plain timm model, for methods
    that fold into the weights.

    Args:
        source: a checkpoint (a file, ``zoo:NAME``, a URL, ``hf://user/repo/FILE@revision``), or a handle in memory, whose
            model is copied as it is: what acts there is exported.
        out: the file, or with ``timm`` the folder.
        form: ``timm``, ``torch`` (``torch.export``, a .pt2 file) or ``onnx``.
        merge: fold the method into the weights: ``auto`` where that is exact, ``yes`` or refuse, ``no``.
        weights: a local file of the backbone's weights, where timm's own are neither cached nor to be downloaded.
        model_args: what timm's factory was given beside name and classes, for ``timm`` and a handle; where left out, what
            the model itself remembers (with timm 1.0.31 it does, with 1.0.20 it does not).
        overwrite: replace what was exported there before.
        progress: tell on stderr what is being done.

    Raises:
        ConfigError: an unknown format, a target that is there already, a missing package.
        CheckpointError: the file cannot be rebuilt.
        MethodError: it does not merge, and must; or what was written computes something else: nothing is left of it.
        UnsupportedModelError: no timm model, or one that the exporter does not take.
        WriteError: a full disk, or a place where no file can be.
    """
    out = Path(out)
    _check(source, out, form, merge, overwrite, weights)
    say = _say if progress else (lambda text: None)
    say("rebuilding the model")
    is_handle = isinstance(source, Handle)
    found = of_handle(source, model_args) if is_handle else of_checkpoint(source, weights)
    if form == "timm":
        timm_folder.check(found)
    expected = found.outputs()
    merged = _merge(found, merge, form)
    report = Report(out, form, merged, largest=max(t.abs().max().item() for t in expected.values()))
    say(f"writing {out}")
    write = _write_folder if form == "timm" else _write_program
    write(found, report, expected, say, lambda: _check_target(out, form, overwrite))
    return report


def _say(text: str) -> None:
    print(f"export: {text}", file=sys.stderr, flush=True)


def _check(source: Any, out: Path, form: str, merge: str, overwrite: bool, weights: str | None) -> None:
    """Refuse what cannot be, before anything is built.

    Raises:
        ConfigError: names the option.
    """
    for option, value, known in (("--format", form, FORMATS), ("--merge", merge, MERGE)):
        if value not in known:
            raise ConfigError(f"{option}: {shown(value)}{did_you_mean(value, known)}")
    if form == "timm" and merge == "no":
        raise ConfigError("--merge no: a timm folder holds weights alone, so the method must be in them; leave it out")
    if not out.name:
        raise ConfigError(f"--out: '{out}' is no name of a {'folder' if form == 'timm' else 'file'}")
    given = {} if isinstance(source, Handle) or is_source(source) else {"the checkpoint": as_path(source)}
    given |= {"the file of weights": as_path(weights)} if weights else {}
    for target in (out,) if form == "timm" else (out, beside(out)):
        for what, file in given.items():
            if file.exists() and target.resolve() in (file.resolve(), *file.resolve().parents):
                same = target.resolve() == file.resolve()
                raise ConfigError(f"--out: '{target}' {'is' if same else 'holds'} {what}{'' if same else f' {file.name}'}")
    _check_target(out, form, overwrite)
    if form == "onnx":
        programs.need_onnx()


def _check_target(out: Path, form: str, overwrite: bool) -> None:
    targets = [out] if form == "timm" else [out, beside(out)]
    for target in targets:
        if not os.path.lexists(target):
            continue
        if form == "timm" and target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
            continue
        if not overwrite:
            raise ConfigError(f"--out: {target} is there already; --overwrite replaces it")
        if form == "timm":
            strange = timm_folder.strange(target)
            if strange:
                raise ConfigError(
                    f"--overwrite: {target} is no timm folder that export wrote ({strange}); it is left as it is"
                )
        elif not target.is_file():
            raise ConfigError(f"--overwrite: {target} is no file")


def beside(out: Path) -> Path:
    """The description of an exported program, as a file of its own."""
    return out.with_name(f"{out.name}.json")


def _merge(source: Exportable, merge: str, form: str) -> bool:
    """Fold what acts into the weights, where it is asked for or exact; whether that was done."""
    if merge == "no" or (merge == "auto" and form != "timm" and not all(h.mergeable for h in acting(source.backbone))):
        return False
    try:
        merge_all(source.backbone)
    except MethodError as error:
        if form == "timm":
            raise MethodError(
                f"{error}; a timm folder holds weights alone: choose the format torch or onnx, whose programs do what the "
                "hooks do"
            ) from error
        if merge == "yes":
            raise
        return False
    return True


def _write_program(
    source: Exportable, report: Report, expected: dict[int, Tensor], say: Callable[[str], None], check: Callable[[], None]
) -> None:
    """The program, then its description; a crash in between leaves a program without one, never with another's."""
    write, run = getattr(programs, f"write_{report.format}"), getattr(programs, f"run_{report.format}")
    described = beside(report.path)
    with replacing(described) as text, replacing(report.path) as temporary:
        write(source, temporary)
        say("comparing it with the model")
        with torch.no_grad():
            program = run(temporary)
            _compare(source, report, expected, program)
        text.write_text(json.dumps(source.describe(), indent=1) + "\n")
        check()  # much may have happened since
        described.unlink(missing_ok=True)


def _write_folder(
    source: Exportable, report: Report, expected: dict[int, Tensor], say: Callable[[str], None], check: Callable[[], None]
) -> None:
    older = None
    try:
        with writing_folder(report.path) as temporary:
            timm_folder.write(source, temporary)
            say("comparing it with the model")
            _compare(source, report, expected, source.leaving.module)
            timm_folder.verify(source, temporary)
            check()  # much may have happened since
            older = _set_aside(report.path)
    except BaseException:
        if older is not None and not report.path.exists():
            os.rename(older, report.path)
        raise
    if older is not None:
        shutil.rmtree(older, ignore_errors=True)


def _set_aside(path: Path) -> Path | None:
    """Give an older export another name, until the new one stands in its place; None where there is none."""
    if not path.is_dir() or not any(path.iterdir()):
        return None
    aside = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.rename(path, aside)
    return aside


@torch.no_grad()
def _compare(source: Exportable, report: Report, expected: dict[int, Tensor], program: Callable[[Tensor], Tensor]) -> None:
    """Note how far a program is from the model.

    Raises:
        MethodError: further than rounding explains, or of another shape.
    """
    for batch, wanted in expected.items():
        found = program(source.inputs(batch))
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise MethodError(
                f"{report.format} gives {tuple(found.shape)} {found.dtype} for {tuple(wanted.shape)} {wanted.dtype}"
            )
        report.differences[batch] = (found.double() - wanted.double()).abs().max().item()
    worst, bound = max(report.differences.values()), BOUND.get(wanted.dtype, 0.0) * report.largest
    if not worst <= bound:  # also where it is no number
        raise MethodError(
            f"what {report.format} computes is {worst:.1e} from the model's outputs, where at most {bound:.1e} is let "
            f"through; {report.path} was not written"
        )
