"""The offline benchmark: parser and what it runs; see ``vpeft/cli.py``."""

import argparse
from collections.abc import Callable
from pathlib import Path


def benchmark(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("--quick", action="store_true", help="the main methods on the ViT with one seed: about an hour")
    parser.add_argument(
        "--out", default="runs/benchmark-report", metavar="DIR", help="of results.csv, the report, and the runs"
    )
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="runs at the same time")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="vit, swin, or timm's names, instead of the plan's")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="instead of the plan's")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="instead of the plan's")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="instead of the plan's")
    parser.add_argument("--again", action="store_true", help="replace results of other settings")
    parser.add_argument("--no-costs", action="store_true", help="leave step times and memory as they are")
    parser.add_argument(
        "--report", action="store_true", help="of the results that are there; nothing is trained or measured"
    )
    parser.add_argument("--rates", action="store_true", help="learning rates instead: one default beside a tuned one")
    parser.add_argument("--set", nargs="*", default=[], metavar="key.sub=value", help="for every run")

    def run(args: argparse.Namespace) -> None:
        from ..errors import ConfigError
        from ..suites.benchmark import benchmark, report
        from ..suites.offline import plans
        from ..suites.rates import tune

        of_runs = ("quick", "models", "methods", "tasks", "seeds", "again", "set")
        for key, alone in (("rates", ("seeds", "again", "no_costs", "quick")), ("report", ("rates", *of_runs))):
            ignored = [name for name in alone if getattr(args, name) not in (None, False, [])]
            if getattr(args, key) and ignored:
                raise ConfigError(f"--{key}: --{ignored[0].replace('_', '-')} would change nothing; leave it out")
        if args.report:
            report(args.out)
            return
        settings = args.set
        if not any(item.startswith("output=") for item in settings):
            settings = [f"output={Path(args.out) / 'runs'}", *settings]
        chosen = args.models, args.methods, args.tasks, args.seeds, settings
        if args.rates:
            for part in plans(True, *chosen):
                for model in part.backbones:
                    print(tune(model, part.entries, part.tasks, args.out, processes=args.processes, overrides=settings))
            return
        benchmark(plans(args.quick, *chosen), args.out, processes=args.processes, again=args.again, costs=not args.no_costs)

    return run
