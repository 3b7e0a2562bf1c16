#!/usr/bin/env python
"""See ``python tools/bench.py --help``; the same as ``vpeft bench``."""

from vpeft.engine.cli import main

if __name__ == "__main__":
    main(command="bench")
