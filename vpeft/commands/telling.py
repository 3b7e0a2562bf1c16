"""What the library says of itself: parsers and what they run; see ``vpeft/cli.py``."""

import argparse
from collections.abc import Callable


def methods(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("name", nargs="?", help="describe this one; without it, list all")

    def run(args: argparse.Namespace) -> None:
        from ..methods import METHODS, list_methods
        from ..numerics import collector_passes_over
        from ..tuning.description import describe

        if args.name:
            with collector_passes_over():  # which would take longer than the answer
                print(describe(args.name))
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
