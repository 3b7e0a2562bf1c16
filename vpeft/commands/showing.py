"""A page to look at: its parser and what it runs; see ``vpeft/cli.py``."""

import argparse
from collections.abc import Callable

from .using import SOURCES


def demo(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("--ckpt", required=True, nargs="+", metavar="FILE", help=f"checkpoints on one backbone; {SOURCES}")
    parser.add_argument("--checkpoint", metavar="FILE", help="backbone weights, where timm cannot find or download them")
    parser.add_argument("--topk", type=int, default=5, metavar="N", help="classes that each adapter shows (default 5)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="to listen at (default 7860)")

    def run(args: argparse.Namespace) -> None:
        from ..demo.page import demo

        demo(args.ckpt, weights=args.checkpoint, host=args.host, port=args.port, topk=args.topk)

    return run
