#!/usr/bin/env python
"""See ``python tools/export.py --help``; the same as ``vpeft export``."""

from vpeft.cli import main

if __name__ == "__main__":
    main(command="export")
