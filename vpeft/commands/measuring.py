"""Measurements: parsers and what they run; see ``vpeft/cli.py``."""

import argparse
from collections.abc import Callable


def bench(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML configuration: backbone, batch, device and rows")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")

    def run(args: argparse.Namespace) -> None:
        from ..bench.allocator import start_again_with_thresholds

        if args.whole_process:
            start_again_with_thresholds()
        from ..bench.measure import bench

        bench(args.cfg, args.overrides)

    return run


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
