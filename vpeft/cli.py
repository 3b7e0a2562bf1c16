"""The ``vpeft`` command; ``tools/*.py`` are the same commands as files."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from .commands import (
    benchmark,
    comparing,
    data,
    leaving,
    making,
    measuring,
    serving,
    shipping,
    showing,
    suites,
    sweeps,
    telling,
    training,
    using,
    zoo,
)
from .errors import VpeftError
from .stopping import any_characters, printing, stoppable
from .version import __version__

COMMANDS = {
    "train": (training.train, "train a method on a data set"),
    "test": (using.test, "evaluate a checkpoint on a data set"),
    "predict": (using.predict, "apply a checkpoint to image or video files"),
    "demo": (showing.demo, "look at checkpoints' answers side by side on a page in the browser"),
    "export": (leaving.export, "write a checkpoint's model for use without vpeft: timm, torch.export, ONNX"),
    "serve": (serving.serve, "serve many tasks on one backbone, over HTTP or from a list of images"),
    "compare": (comparing.compare, "put finished runs side by side: settings, metrics, classes, samples"),
    "table": (training.table, "train configurations under several seeds and compare them"),
    "search": (training.search, "search for the sizes of a method's modules in each block, under a budget"),
    "sweep": (sweeps.sweep, "try settings on validation data, then train and test the best ones"),
    "benchmark": (benchmark.benchmark, "train methods on tasks that need no download, and compare them"),
    "zoo": (zoo.zoo, "list, download, verify and add trained adapters"),
    "push": (zoo.push, "upload a checkpoint with a model card to the Hugging Face Hub"),
    "suite": (suites.suite, "train a method on all tasks of a benchmark, and compare it with published results"),
    "published": (suites.published, "print published results of a benchmark, and your runs beside them"),
    "configs": (shipping.configs, "list, show or copy the example configurations"),
    "data": (data.data, "list, check and build the data sets of benchmarks"),
    "methods": (telling.methods, "list the methods, or describe one"),
    "bench": (measuring.bench, "measure time and memory of methods on a backbone"),
    "docs": (telling.docs, "write the pages in docs/ that a program can write"),
    "motion-clips": (making.motion_clips, "write video files whose label is how a garment moves"),
    "mmseg-config": (making.mmseg_config, "rewrite a configuration of mmsegmentation for an adapted backbone"),
    "bench-kept": (measuring.bench_kept, "list what a training step keeps for backward, and which operation keeps it"),
    "bench-route": (measuring.bench_route, "measure batches of mixed tasks beside separate forwards"),
    "bench-decode": (measuring.bench_decode, "measure how many clips per second are decoded"),
    "bench-loader": (measuring.bench_loader, "measure how many images per second are read, beside timm's loader"),
    "pretrain": (training.pretrain, "train a whole backbone and write its weights as timm reads them"),
}


def main(argv: Sequence[str] | None = None, command: str | None = None) -> None:
    """Run one command; a user's mistake ends in one line on stderr and exit status 2, Ctrl-C in one and 130, SIGTERM 143.

    Where nobody reads its output any more it ends quietly, with 141.

    Args:
        argv: arguments, those of the process where None.
        command: the command, where the program stands for one (``tools/train.py``).
    """
    first = os.environ.get("RANK", "0") == "0"  # of several processes one speaks
    with stoppable() as stopping:
        try:
            with any_characters(), printing():
                args = _parsed(argv, command)
                args.whole_process = argv is None
                args.run(args)
        except KeyboardInterrupt as stop:
            if first:
                print(f"interrupted{f'; {stop}' if str(stop) else ''}", file=sys.stderr)
            raise SystemExit(128 + (stopping.signal or signal.SIGINT)) from None  # as a shell reports the signal
        except VpeftError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            raise SystemExit(2) from None


def _parsed(argv: Sequence[str] | None, command: str | None) -> argparse.Namespace:
    """The arguments of a command, and ``run``, which takes them; parsers end the process after --help and mistakes."""
    parser = argparse.ArgumentParser(prog=None if command else "vpeft", description=__doc__ if not command else None)
    if command:
        parser.set_defaults(run=COMMANDS[command][0](parser))
    else:
        argv = sys.argv[1:] if argv is None else argv
        parser.add_argument("--version", action="version", version=f"vpeft {__version__}")
        parsers = parser.add_subparsers(required=True, metavar="COMMAND")
        for name, (build, text) in COMMANDS.items():
            child = parsers.add_parser(name, help=text, description=text)
            if name in argv[:1]:  # what the others' options are read from need not be imported
                child.set_defaults(run=build(child))
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(r.startswith("-") or "=" not in r for r in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # settings on both sides of an option, of which argparse takes the first ones alone
        args.overrides += rest
    return args


if __name__ == "__main__":
    main()
