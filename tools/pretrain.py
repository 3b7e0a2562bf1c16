#!/usr/bin/env python
"""See ``python tools/pretrain.py --help``; the same as ``vpeft pretrain``."""

from vpeft.cli import main

if __name__ == "__main__":
    main(command="pretrain")
