"""Data of benchmarks: parsers and what they run; see ``vpeft/cli.py``."""

import argparse
from collections.abc import Callable


def data(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|check|build")
    listing = actions.add_parser("list", help="the sets that data.source takes")
    listing.add_argument("start", nargs="?", default="", metavar="START", help="only names that start so, such as vtab/")
    checking = actions.add_parser("check", help="what of them is in a folder; status 1 where something is missing or wrong")
    checking.add_argument("root", metavar="ROOT", help="as data.root")
    checking.add_argument("names", nargs="*", metavar="SET", help="these alone, such as vtab or fgvc/cub")
    building = actions.add_parser("build", help="write a VTAB-1k task's lists and images from the raw download")
    building.add_argument("name", metavar="vtab/TASK")
    building.add_argument("--from", dest="raw", metavar="RAW", help="folder of the raw download; dSprites needs none")
    building.add_argument("--out", required=True, metavar="ROOT", help="where the task's folder is made")
    building.add_argument(
        "--pixels", default="zip-jpeg", metavar="zip-jpeg|exact",
        help="JPEG of quality 75, as in the zip that papers share, or the exact pixels as PNG (default: %(default)s)",
    )  # fmt: skip

    def run(args: argparse.Namespace) -> None:
        if args.action == "list":
            _list(args.start)
        elif args.action == "check":
            _check(args.root, args.names)
        else:
            from ..data.sets.building import build

            print(build(args.name, args.raw, args.out, args.pixels))

    return run


def _list(start: str) -> None:
    from ..data.sets import SETS

    for name, found in SETS.items():
        if name.startswith(start):
            splits = ", ".join(f"{split} {size:,}" for split, size in found.sizes.items())
            print(f"{name:28s} {found.classes:5d} classes   {splits}   {found.folders[0]}/")


def _check(root: str, names: list[str]) -> None:
    from ..data.sets.checking import check_root

    found = check_root(root, names)
    print(*found, sep="\n")
    there = [one for one in found if one.there]
    if not there or not all(one.complete for one in (found if names else there)):
        raise SystemExit(1)
