#!/usr/bin/env python
"""See ``python tools/table.py --help``; the same as ``vpeft table``."""

from vpeft.cli import main

if __name__ == "__main__":
    main(command="table")
