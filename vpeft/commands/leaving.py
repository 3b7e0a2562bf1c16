"""The way out: parser and what it runs; see ``vpeft/cli.py``."""

import argparse
from collections.abc import Callable

from .using import SOURCES


def export(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("--ckpt", required=True, metavar="FILE", help=f"checkpoint of vpeft train; {SOURCES}")
    parser.add_argument("--format", required=True, metavar="FORM", help="timm (a folder), torch (.pt2) or onnx")
    parser.add_argument("--out", required=True, metavar="PATH", help="the file, or with --format timm the folder")
    parser.add_argument("--merge", default="auto", metavar="WHEN", help="fold the method into the weights: auto, yes or no")
    parser.add_argument("--checkpoint", metavar="FILE", help="backbone weights, where timm cannot find or download them")
    parser.add_argument("--overwrite", action="store_true", help="replace what was exported there before")

    def run(args: argparse.Namespace) -> None:
        from ..export import export

        found = export(
            args.ckpt, args.out, form=args.format, merge=args.merge, weights=args.checkpoint, overwrite=args.overwrite,
            progress=True,
        )  # fmt: skip
        print(found)

    return run
