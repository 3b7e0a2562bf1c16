#!/usr/bin/env python
"""See ``python tools/search.py --help``; the same as ``vpeft search``."""

from vpeft.cli import main

if __name__ == "__main__":
    main(command="search")
