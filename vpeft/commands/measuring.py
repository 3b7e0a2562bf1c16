"""Measurements: parsers and what they run; see ``vpeft/cli.py``."""

import argparse
from collections.abc import Callable


def bench(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--cfg", metavar="FILE", help="YAML configuration: backbone, batch, device and rows")
    what.add_argument(
        "--plan",
        nargs=2,
        metavar=("MODEL", "METHOD"),
        help="tell the memory of a training step instead, without the weights; key=value are the method's options",
    )
    what.add_argument(
        "--check", metavar="FILE", help="measure again what --write-reference wrote; status 1 where rows moved"
    )
    parser.add_argument("--write-reference", metavar="FILE", help="with --cfg: the ratios and their noise, for --check")
    parser.add_argument("--repeats", type=int, metavar="N", help="measurements for --write-reference (3) or --check (1)")
    plan = parser.add_argument_group("with --plan")
    plan.add_argument("--batch-size", type=int, nargs="+", metavar="N", help="16, 64 and 256")
    plan.add_argument("--precision", help="fp32, bf16 or, on a GPU, fp16; fp32")
    plan.add_argument("--optim", metavar="NAME", help="an optimiser of timm; adamw")
    plan.add_argument("--device", help="cpu or cuda; a GPU where there is one")
    plan.add_argument("--num-classes", type=int, metavar="N", help="100")
    plan.add_argument("--img-size", type=int, metavar="N", help="the model's own")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")

    def run(args: argparse.Namespace) -> None:
        _refuse_unused(args)
        if args.plan:
            _plan(args)
            return
        from ..bench.allocator import start_again_with_thresholds

        if args.whole_process:
            start_again_with_thresholds()
        if args.check or args.write_reference:
            _reference(args)
            return
        from ..bench.measure import bench

        bench(args.cfg, args.overrides)

    return run


def bench_kept(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML configuration of `vpeft bench`")
    parser.add_argument("--rows", nargs="+", default=[], metavar="LABEL", help="instead of all")
    parser.add_argument("--least", type=float, default=0.005, metavar="SHARE", help="leave out what is less of its row")
    parser.add_argument("--set", nargs="*", default=[], metavar="key.sub=value", help="overrides of the configuration")

    def run(args: argparse.Namespace) -> None:
        from ..bench.kept import list_kept

        print(list_kept(args.cfg, args.set, args.rows, args.least))

    return run


_OF_PLAN = ("batch_size", "precision", "optim", "device", "num_classes", "img_size")


def _refuse_unused(args: argparse.Namespace) -> None:
    """Refuse arguments that what was asked for takes no notice of.

    Raises:
        ConfigError: names the argument, and what is set instead.
    """
    from ..errors import ConfigError

    given = [name for name in (*_OF_PLAN, "write_reference", "repeats") if getattr(args, name) is not None]
    for name in given:
        option = f"--{name.replace('_', '-')}"
        if name in _OF_PLAN and not args.plan:
            raise ConfigError(f"{option} is for --plan; a configuration is measured with its own: give such as batch_size=8")
        if name == "write_reference" and not args.cfg:
            raise ConfigError(f"{option} is for --cfg; leave it out")
        if name == "repeats" and not (args.check or args.write_reference):
            raise ConfigError(f"{option} is for --write-reference and --check; leave it out, or give such as rounds=20")


def _plan(args: argparse.Namespace) -> None:
    import torch

    from ..bench.plan import free_bytes, plan, settings, told

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision, optim = args.precision or "fp32", args.optim or "adamw"
    found = plan(
        *args.plan,
        settings(args.overrides),
        precision=precision,
        optim=optim,
        device=device,
        num_classes=100 if args.num_classes is None else args.num_classes,
        img_size=args.img_size,
    )
    print(told(found, args.batch_size or (16, 64, 256), free_bytes(device), f"{precision}, {optim}, {device}"))


def _reference(args: argparse.Namespace) -> None:
    from ..bench.reference import check_reference, write_reference

    if args.check is None:
        write_reference(args.write_reference, args.cfg, args.overrides, repeats=3 if args.repeats is None else args.repeats)
    elif check_reference(args.check, args.overrides, repeats=1 if args.repeats is None else args.repeats):
        raise SystemExit(1)


def bench_route(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML configuration: backbone, tasks, batch and rows")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")

    def run(args: argparse.Namespace) -> None:
        from ..bench.routing import bench_route

        bench_route(args.cfg, args.overrides)

    return run


def bench_decode(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("paths", nargs="*", metavar="FILE", help="videos or folders of them; made ones where none is given")
    parser.add_argument("--clips", type=int, default=200, help="clips to read")
    parser.add_argument("--frames", type=int, default=8, help="of each clip")
    parser.add_argument("--stride", type=int, default=4, help="from one frame to the next")
    parser.add_argument("--size", type=int, default=224, help="of the crop, in pixels")
    parser.add_argument("--workers", type=int, default=0, help="of the loader")

    def run(args: argparse.Namespace) -> None:
        from ..bench.decode import bench_decode

        bench_decode(
            args.paths, clips=args.clips, frames=args.frames, stride=args.stride, size=args.size, workers=args.workers
        )

    return run


def bench_loader(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("root", nargs="?", metavar="ROOT", help="of ROOT/SPLIT/CLASS/IMAGE; made JPEGs where left out")
    parser.add_argument("--split", default="train", metavar="NAME", help="its folder")
    parser.add_argument(
        "--model", default="vit_base_patch16_224.augreg_in21k", metavar="NAME", help="whose transform is used"
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="of each loader")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="passes of each loader")

    def run(args: argparse.Namespace) -> None:
        from ..bench.loader import bench_loader

        bench_loader(
            args.root,
            split=args.split,
            model=args.model,
            batch_size=args.batch_size,
            workers=args.workers,
            rounds=args.rounds,
        )

    return run
