"""What the library says of itself: parsers and what they run; see ``vpeft/cli.py``."""

import argparse
import gc
from collections.abc import Callable


def methods(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("name", nargs="?", help="describe this one; without it, list all")

    def run(args: argparse.Namespace) -> None:
        from ..methods import METHODS, list_methods
        from ..tuning.description import describe

        if args.name:
            gc.freeze()  # else Python looks through all that torch and timm imported, which takes longer than the answer
            print(describe(args.name))
            gc.unfreeze()
        else:
            for name in list_methods():
                print(f"{name:16s} {METHODS[name].paper}")

    return run


def docs(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("--out", default="docs", metavar="DIR", help="where the pages are written")
    parser.add_argument("--compatibility", action="store_true", help="also try every method on every architecture (minutes)")

    def run(args: argparse.Namespace) -> None:
        from ..docs.pages import write_pages

        print(*write_pages(args.out, compatibility=args.compatibility), sep="\n")

    return run
