"""The model zoo and the Hub: parsers and what they run; see ``vpeft/cli.py``."""

import argparse
from collections.abc import Callable

from ..errors import CheckpointError, ConfigError, did_you_mean, shown

INDEX = "a folder with an index.json, a URL, or hf://user/repo; VPEFT_ZOO or the package's own where left out"


def zoo(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    listing = actions.add_parser("list", help="what there is")
    listing.add_argument("--task", metavar="NAME")
    listing.add_argument("--method", metavar="NAME")
    showing = actions.add_parser("show", help="all that is known of one entry")
    showing.add_argument("name", metavar="NAME")
    loading = actions.add_parser("download", help="bring files here, verified; prints their paths")
    loading.add_argument("names", nargs="+", metavar="NAME")
    loading.add_argument("--out", metavar="DIR", help="a copy of each as DIR/NAME.safetensors; the cache where left out")
    verifying = actions.add_parser("verify", help="compare files with the index")
    verifying.add_argument("names", nargs="*", metavar="NAME", help="all where left out")
    for action in (listing, showing, loading, verifying):
        action.add_argument("--index", metavar="PLACE", help=INDEX)
    adding = actions.add_parser("add", help="make an entry of a finished run, repeated under several seeds")
    _arguments_of_add(adding)
    run = {"list": _list, "show": _show, "download": _download, "verify": _verify, "add": _add}
    return lambda args: run[args.action](args)


def _arguments_of_add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of vpeft train, one for each seed; the first's file")
    parser.add_argument("--name", required=True, metavar="NAME", help="small letters, digits and ._-")
    parser.add_argument("--folder", metavar="DIR", help="of the zoo; model_zoo of the repository where left out")
    parser.add_argument("--cfg", metavar="FILE", help="the shipped configuration; what the run says where left out")
    parser.add_argument("--dataset", metavar="TEXT", help="data.source where left out")
    parser.add_argument("--licence", default="Apache-2.0", metavar="NAME", help="of the file (default Apache-2.0)")
    parser.add_argument("--note", action="append", default=[], metavar="TEXT", help="shown on the page; may be repeated")
    parser.add_argument("--max-kb", type=int, default=300, metavar="N", help="the largest file in kB (default 300)")
    parser.add_argument("--overwrite", action="store_true", help="replace an entry of this name")


def _list(args: argparse.Namespace) -> None:
    from ..zoo import list as entries
    from ..zoo.using import main_metric

    found = entries(task=args.task, method=args.method, index=args.index)
    if not found:
        every = entries(index=args.index)
        for key, value in (("task", args.task), ("method", args.method)):
            known = sorted({name for entry in every if (name := getattr(entry, key)) is not None})
            if value is not None and value not in known:
                raise ConfigError(f"--{key}: no entry has {shown(value)}{did_you_mean(value, known)}")
    width = max((len(entry.name) for entry in found), default=0)
    for entry in found:
        main = main_metric(entry)
        spread = f" ± {main.std:.2f}" if main.std is not None else ""
        what = entry.method or "backbone"
        metric = f"{main.name} {main.mean:.2f}{spread}"
        print(f"{entry.name:{width}}  {entry.task:14}  {what:14}  {metric}  {entry.size / 1000:.0f} kB")


def _show(args: argparse.Namespace) -> None:
    import json
    from dataclasses import asdict

    from ..fetching import open_index
    from ..zoo.using import as_entry

    entry = as_entry(open_index(args.index).entry(args.name.removeprefix("zoo:")))
    print(json.dumps(asdict(entry), indent=1, ensure_ascii=False))


def _download(args: argparse.Namespace) -> None:
    from ..zoo import download

    print(*download(args.names, args.out, index=args.index), sep="\n")


def _verify(args: argparse.Namespace) -> None:
    from ..zoo import verify

    found = verify(args.names, index=args.index)
    for name, wrong in found.items():
        print(wrong or f"{name}: ok")
    broken = [name for name, wrong in found.items() if wrong]
    if broken:
        raise CheckpointError(f"{len(broken)} of {len(found)} entries do not have the files that the index tells")


def _add(args: argparse.Namespace) -> None:
    from ..zoo.adding import add

    entry, changed = add(
        args.runs, args.name, folder=args.folder, cfg=args.cfg, dataset=args.dataset, licence=args.licence, notes=args.note,
        max_kb=args.max_kb, overwrite=args.overwrite,
    )  # fmt: skip
    print(*changed, f"{entry['name']}: {entry['size'] / 1000:.0f} kB, {entry['command']}", sep="\n")


def push(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("source", metavar="RUN_OR_FILE", help="a run's folder, a checkpoint, or zoo:NAME")
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="of the Hugging Face Hub; made where missing")
    parser.add_argument("--private", action="store_true", help="only its owner sees it")
    parser.add_argument("--revision", metavar="BRANCH", help="made where missing; the main one where left out")
    parser.add_argument("--licence", default="Apache-2.0", metavar="NAME", help="in the card (default Apache-2.0)")

    def run(args: argparse.Namespace) -> None:
        from ..zoo.pushing import push

        print(push(args.source, args.repo, private=args.private, revision=args.revision, licence=args.licence))

    return run
