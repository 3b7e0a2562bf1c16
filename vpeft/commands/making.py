"""Files for a start: parsers and what they run; see ``vpeft/cli.py``."""

import argparse
from collections.abc import Callable

from ..errors import ConfigError
from ..options import check_values, declared


def motion_clips(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    from ..tasks.video.config import MotionConfig

    options = declared(MotionConfig)
    parser.add_argument("--out", required=True, metavar="DIR", help="where the clips are written")
    parser.add_argument("--fashion-mnist", metavar="DIR", help="with its four files; the excerpt that ships where left out")
    for this in options:
        parser.add_argument(f"--{this.name}", type=this.hint, default=this.default, help=f"default {this.default}")

    def run(args: argparse.Namespace) -> None:
        from omegaconf import OmegaConf

        from ..tasks.video.motion import make_motion

        values = {this.name: getattr(args, this.name) for this in options}
        check_values(MotionConfig, values, ConfigError)
        make_motion(args.out, OmegaConf.structured(MotionConfig(**values)), args.fashion_mnist)
        print(f"{args.out}: {args.train} training and {args.test} test clips, with lists train.txt and test.txt")

    return run


def mmseg_config(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    parser.add_argument("stock", metavar="STOCK.py", help="a file, or one that mmsegmentation ships, by its name")
    parser.add_argument("--model", required=True, metavar="NAME", help="timm's name of the backbone, a ViT or Swin")
    parser.add_argument("--method", required=True, metavar="NAME", help="see: vpeft methods")
    parser.add_argument("--options", nargs="*", default=[], metavar="key=value", help="of the method")
    parser.add_argument("--model-kwargs", nargs="*", default=[], metavar="key=value", help="of timm.create_model")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate (default 1e-4)")
    parser.add_argument("--no-pretrained", action="store_true", help="random frozen weights, to try things out")
    parser.add_argument("--sync-bn", action="store_true", help="keep SyncBN in the heads, for several GPUs")
    parser.add_argument("--out", required=True, metavar="MINE.py", help="the file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace it where it is there already")

    def run(args: argparse.Namespace) -> None:
        from ..integrations.mmseg.stock import Choice, pairs, write_stock

        choice = Choice(
            args.model, args.method, pairs("--options", args.options), lr=args.lr, pretrained=not args.no_pretrained,
            model_kwargs=pairs("--model-kwargs", args.model_kwargs), sync_bn=args.sync_bn,
        )  # fmt: skip
        notes = write_stock(args.stock, args.out, choice, overwrite=args.overwrite)
        print(*notes, f"written to {args.out}; train it as any of mmsegmentation's (tools/train.py {args.out})", sep="\n")

    return run
