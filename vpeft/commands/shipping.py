"""What ships with the package: parsers and what they run; see ``vpeft/cli.py``."""

import argparse
from collections.abc import Callable


def configs(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|show|copy")
    listing = actions.add_parser("list", help="names, as they may be given to --cfg")
    listing.add_argument(
        "start", nargs="?", default="", metavar="START", help="only these, such as digits/; spaces/ are for --space"
    )
    showing = actions.add_parser("show", help="one with its bases, or as it would be run, without the defaults")
    showing.add_argument("name", metavar="NAME")
    showing.add_argument("overrides", nargs="*", metavar="key.sub=value", help="as for train, such as task=cifar")
    copying = actions.add_parser("copy", help="copy them and their bases, to be changed")
    copying.add_argument("names", nargs="+", metavar="NAME")
    copying.add_argument("--out", default="configs", metavar="DIR", help="folder (default: %(default)s)")

    def run(args: argparse.Namespace) -> None:
        from ..engine import shipped
        from ..engine.config import resolved
        from ..errors import ConfigError

        if args.action == "list":
            print(*shipped.listed(args.start), sep="\n")
        elif args.action == "show":
            if args.overrides and shipped.is_space(args.name):
                raise ConfigError(f"{args.overrides[0]}: a space has no settings to change; leave it out, or copy the space")
            print(resolved(shipped.find(args.name), args.overrides) if args.overrides else shipped.text(args.name), end="")
        else:
            print(*shipped.copy(args.names, args.out), sep="\n")

    return run
