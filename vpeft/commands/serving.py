"""Serving a book of tasks, and measuring it: parsers and what they run; see ``vpeft/cli.py``."""

import argparse
from collections.abc import Callable

from ..errors import ConfigError
from ..options import declared


def serve(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    from ..serving.settings import ServeOptions

    parser.add_argument("--book", required=True, metavar="FILE", help="JSON or YAML: tasks and their checkpoints")
    parser.add_argument("--list", metavar="FILE", help="no server: predict the images of a list, image,task in each line")
    parser.add_argument("--folder", metavar="DIR", help="no server: predict the images below DIR/<task>")
    parser.add_argument("--topk", type=int, metavar="N", help="of a list: classes to report, in the place of the book's")
    parser.add_argument("--format", metavar="FORM", help="of a list: what is printed, text, csv or jsonl")
    parser.add_argument("--save", metavar="FILE", help="of a list: also write each line here: .csv, .jsonl or .txt")
    parser.add_argument("--json", metavar="FILE", help="of a list: also write the predictions here, one JSON list")
    parser.add_argument("--out", metavar="DIR", help="of a list: folder for masks")
    parser.add_argument(
        "--skip-broken", action="store_true",
        help="leave out images that cannot be read; the server starts although tasks' files cannot be served",
    )  # fmt: skip
    for this in declared(ServeOptions):
        name = f"--{this.name.replace('_', '-')}"
        default = f" (default {this.default})" if this.default != "" else ""
        parser.add_argument(name, dest=this.name, type=this.hint, metavar="X", help=f"{this.option.help}{default}")

    def run(args: argparse.Namespace) -> None:
        from ..serving.settings import options_of

        options = options_of(vars(args))
        if args.list is not None and args.folder is not None:
            raise ConfigError("--list, --folder: give one of them")
        if args.list is None and args.folder is None:
            given = [n for n in ("topk", "format", "save", "json", "out") if getattr(args, n) is not None]
            if given:
                raise ConfigError(f"--{given[0]}: it is of a list; give --list or --folder")
            from ..serving.server import serve

            serve(args.book, options, keep_going=args.skip_broken)
        else:
            _batch(args, options)

    return run


def _batch(args: argparse.Namespace, options) -> None:
    import torch

    from ..serving.book import read_book
    from ..serving.listing import predict_list, read_folder, read_list
    from ..serving.server import device_of
    from ..serving.shelf import Shelf
    from ..tasks.protocol import PredictOptions

    device = device_of(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    book = read_book(args.book, memory=options.memory_bytes, keep_going=args.skip_broken)
    wanted = read_folder(args.folder, book) if args.list is None else read_list(args.list, book)
    predict = PredictOptions(args.topk, options.max_batch, None, args.out, args.skip_broken)
    predict_list(
        Shelf(book, options.memory_bytes, device), wanted, predict, save=args.save, json_file=args.json,
        form=args.format or "text", inputs=() if args.list is None else (args.list,),
    )  # fmt: skip
