"""The ``vpeft`` command; ``tools/*.py`` are the same commands as files."""

import argparse
import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from .errors import ConfigError, VpeftError
from .options import check_values, declared
from .stopping import stoppable


def _train(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument("--extend", type=int, metavar="N", help="train a finished run N epochs further")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")

    def run(args: argparse.Namespace) -> None:
        from .engine.config import load_config
        from .engine.plan import extended
        from .engine.train import train

        config = load_config(args.cfg, args.overrides)
        if args.extend is not None:
            extended(config, args.extend)
        train(config)

    return run


def _pretrain(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")

    def run(args: argparse.Namespace) -> None:
        from .engine.config import load_config
        from .engine.pretrain import pretrain

        pretrain(load_config(args.cfg, args.overrides))

    return run


def _test(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML configuration (its model and data sections)")
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint of vpeft train")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"))
    parser.add_argument("--merge", action="store_true", help="fold the method into the weights first")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")

    def run(args: argparse.Namespace) -> None:
        from .engine.config import load_config
        from .engine.test import test

        test(load_config(args.cfg, args.overrides), args.ckpt, split=args.split, merge=args.merge)

    return run


def _predict(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint of vpeft train; holds all that is needed")
    parser.add_argument("paths", nargs="+", metavar="FILE", help="image or video files, or folders of them")
    parser.add_argument("--topk", type=int, metavar="N", help="classes to report per file; the five best where left out")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="files at once; 64 where left out")
    parser.add_argument("--checkpoint", metavar="FILE", help="backbone weights, where timm cannot find or download them")
    parser.add_argument("--format", default="text", metavar="FORM", help="of what is printed: text, csv or jsonl")
    parser.add_argument("--save", metavar="FILE", help="also write each line here as it comes: .csv, .jsonl or .txt")
    parser.add_argument("--json", metavar="FILE", help="also write the predictions here, one JSON list (or .jsonl: lines)")
    parser.add_argument("--out", metavar="DIR", help="of masks and overlays, where the task has them")
    parser.add_argument("--skip-broken", action="store_true", help="leave out files that cannot be read, and count them")

    def run(args: argparse.Namespace) -> None:
        from .engine.predict import run as predict
        from .tasks.protocol import PredictOptions

        options = PredictOptions(args.topk, args.batch_size, args.checkpoint, args.out, args.skip_broken)
        predict(args.ckpt, args.paths, options, json_file=args.json, save=args.save, form=args.format)

    return run


def _methods(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("name", nargs="?", help="describe this one; without it, list all")

    def run(args: argparse.Namespace) -> None:
        from .methods import METHODS, list_methods
        from .tuning.description import describe

        if args.name:
            gc.freeze()  # else Python looks through all that torch and timm imported, which takes longer than the answer
            print(describe(args.name))
            gc.unfreeze()
        else:
            for name in list_methods():
                print(f"{name:16s} {METHODS[name].paper}")

    return run


def _table(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("--cfg", required=True, nargs="+", metavar="FILE", help="YAML configurations, one row each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", default="runs/table", metavar="PATH", help="of the results, without .md, .json, .png")
    parser.add_argument("--set", nargs="*", default=[], metavar="key.sub=value", help="overrides for every configuration")

    def run(args: argparse.Namespace) -> None:
        from .engine.table import table

        table(args.cfg, args.set, seeds=args.seeds, out=args.out)

    return run


def _search(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML configuration with a section `search`")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="one search for each, and a table of them")
    parser.add_argument("--out", default="runs/search", metavar="PATH", help="of the table, without .md, .json")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")

    def run(args: argparse.Namespace) -> None:
        from .search.config import load_search_config
        from .search.driver import search
        from .search.table import searches

        if args.seeds is None:
            search(load_search_config(args.cfg, args.overrides))
        else:
            searches(args.cfg, args.overrides, seeds=args.seeds, out=args.out)

    return run


def _docs(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("--out", default="docs", metavar="DIR", help="where the pages are written")
    parser.add_argument("--compatibility", action="store_true", help="also try every method on every architecture (minutes)")

    def run(args: argparse.Namespace) -> None:
        from .docs.pages import write_pages

        print(*write_pages(args.out, compatibility=args.compatibility), sep="\n")

    return run


def _bench(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML configuration: backbone, batch, device and rows")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")

    def run(args: argparse.Namespace) -> None:
        from .bench.measure import bench

        bench(args.cfg, args.overrides)

    return run


def _bench_route(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML configuration: backbone, tasks, batch and rows")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")

    def run(args: argparse.Namespace) -> None:
        from .bench.routing import bench_route

        bench_route(args.cfg, args.overrides)

    return run


def _motion_clips(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    from .tasks.video.config import MotionConfig

    options = declared(MotionConfig)
    parser.add_argument("--out", required=True, metavar="DIR", help="where the clips are written")
    parser.add_argument("--fashion-mnist", metavar="DIR", help="with its four files; the excerpt that ships where left out")
    for this in options:
        parser.add_argument(f"--{this.name}", type=this.hint, default=this.default, help=f"default {this.default}")

    def run(args: argparse.Namespace) -> None:
        from omegaconf import OmegaConf

        from .tasks.video.motion import make_motion

        values = {this.name: getattr(args, this.name) for this in options}
        check_values(MotionConfig, values, ConfigError)
        make_motion(args.out, OmegaConf.structured(MotionConfig(**values)), args.fashion_mnist)
        print(f"{args.out}: {args.train} training and {args.test} test clips, with lists train.txt and test.txt")

    return run


def _mmseg_config(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("stock", metavar="STOCK.py", help="a file, or one that mmsegmentation ships, by its name")
    parser.add_argument("--model", required=True, metavar="NAME", help="timm's name of the backbone, a ViT or Swin")
    parser.add_argument("--method", required=True, metavar="NAME", help="see: vpeft methods")
    parser.add_argument("--options", nargs="*", default=[], metavar="key=value", help="of the method")
    parser.add_argument("--model-kwargs", nargs="*", default=[], metavar="key=value", help="of timm.create_model")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate (default 1e-4)")
    parser.add_argument("--no-pretrained", action="store_true", help="random frozen weights, to try things out")
    parser.add_argument("--sync-bn", action="store_true", help="keep SyncBN in the heads, for several GPUs")
    parser.add_argument("--out", required=True, metavar="MINE.py", help="the file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace it where it is there already")

    def run(args: argparse.Namespace) -> None:
        from .integrations.mmseg.stock import Choice, pairs, write_stock

        choice = Choice(
            args.model, args.method, pairs("--options", args.options), lr=args.lr, pretrained=not args.no_pretrained,
            model_kwargs=pairs("--model-kwargs", args.model_kwargs), sync_bn=args.sync_bn,
        )  # fmt: skip
        notes = write_stock(args.stock, args.out, choice, overwrite=args.overwrite)
        print(*notes, f"written to {args.out}; train it as any of mmsegmentation's (tools/train.py {args.out})", sep="\n")

    return run


def _bench_decode(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("paths", nargs="*", metavar="FILE", help="videos or folders of them; made ones where none is given")
    parser.add_argument("--clips", type=int, default=200, help="clips to read")
    parser.add_argument("--frames", type=int, default=8, help="of each clip")
    parser.add_argument("--stride", type=int, default=4, help="from one frame to the next")
    parser.add_argument("--size", type=int, default=224, help="of the crop, in pixels")
    parser.add_argument("--workers", type=int, default=0, help="of the loader")

    def run(args: argparse.Namespace) -> None:
        from .bench.decode import bench_decode

        bench_decode(
            args.paths, clips=args.clips, frames=args.frames, stride=args.stride, size=args.size, workers=args.workers
        )

    return run


COMMANDS = {
    "train": (_train, "train a method on a data set"),
    "test": (_test, "evaluate a checkpoint on a data set"),
    "predict": (_predict, "apply a checkpoint to image or video files"),
    "table": (_table, "train configurations under several seeds and compare them"),
    "search": (_search, "search for the sizes of a method's modules in each block, under a budget"),
    "methods": (_methods, "list the methods, or describe one"),
    "bench": (_bench, "measure time and memory of methods on a backbone"),
    "docs": (_docs, "write the pages in docs/ that a program can write"),
    "motion-clips": (_motion_clips, "write video files whose label is how a garment moves"),
    "mmseg-config": (_mmseg_config, "rewrite a configuration of mmsegmentation for an adapted backbone"),
    "bench-route": (_bench_route, "measure batches of mixed tasks beside separate forwards"),
    "bench-decode": (_bench_decode, "measure how many clips per second are decoded"),
    "pretrain": (_pretrain, "train one of the embedded backbones from random weights"),
}


def main(argv: Sequence[str] | None = None, command: str | None = None) -> None:
    """Run one command; a user's mistake ends in one line on stderr and exit status 2, Ctrl-C in one and 130, SIGTERM 143.

    Args:
        argv: arguments, those of the process where None.
        command: the command, where the program stands for one (``tools/train.py``).
    """
    parser = argparse.ArgumentParser(prog=None if command else "vpeft", description=__doc__ if not command else None)
    if command:
        parser.set_defaults(run=COMMANDS[command][0](parser))
    else:
        argv = sys.argv[1:] if argv is None else argv
        parser.add_argument("--version", action="version", version=f"vpeft {version('vpeft')}")
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
    first = os.environ.get("RANK", "0") == "0"  # of several processes one speaks
    with stoppable() as stopping:
        try:
            args.run(args)
        except KeyboardInterrupt as stop:
            if first:
                print(f"interrupted{f'; {stop}' if str(stop) else ''}", file=sys.stderr)
            raise SystemExit(128 + (stopping.signal or signal.SIGINT)) from None  # as a shell reports the signal
        except VpeftError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            raise SystemExit(2) from None


if __name__ == "__main__":
    main()
