"""What is done with a checkpoint: parsers and what they run; see ``vpeft/cli.py``."""

import argparse
from collections.abc import Callable

SOURCES = "or zoo:NAME, https://…, hf://user/repo/FILE@revision"


def test(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML configuration (its model and data sections)")
    parser.add_argument("--ckpt", required=True, metavar="FILE", help=f"checkpoint of vpeft train; {SOURCES}")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"))
    parser.add_argument("--merge", action="store_true", help="fold the method into the weights first")
    parser.add_argument("--out", metavar="DIR", help="a new folder for predictions, confusion matrix, reliability, a page")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")

    def run(args: argparse.Namespace) -> None:
        from ..engine.config import load_config
        from ..engine.test import test

        test(load_config(args.cfg, args.overrides), args.ckpt, split=args.split, merge=args.merge, out=args.out)

    return run


def predict(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("--ckpt", required=True, metavar="FILE", help=f"checkpoint of vpeft train; {SOURCES}")
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
        from ..engine.predict import run as predict
        from ..tasks.protocol import PredictOptions

        options = PredictOptions(args.topk, args.batch_size, args.checkpoint, args.out, args.skip_broken)
        predict(args.ckpt, args.paths, options, json_file=args.json, save=args.save, form=args.format)

    return run
