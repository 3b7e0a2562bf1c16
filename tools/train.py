#!/usr/bin/env python
"""See ``python tools/train.py --help``; the same as ``vpeft train``."""

from vpeft.cli import main

if __name__ == "__main__":
    main(command="train")
