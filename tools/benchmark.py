#!/usr/bin/env python
"""See ``python tools/benchmark.py --help``; the same as ``vpeft benchmark``."""

from vpeft.cli import main

if __name__ == "__main__":
    main(command="benchmark")
