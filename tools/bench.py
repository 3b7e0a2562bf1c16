#!/usr/bin/env python
"""See ``python tools/bench.py --help``; the same as ``vpeft bench``."""

from vpeft.cli import main

if __name__ == "__main__":
    main(command="bench")
