#!/usr/bin/env python
"""See ``python tools/sweep.py --help``; the same as ``vpeft sweep``."""

from vpeft.cli import main

if __name__ == "__main__":
    main(command="sweep")
