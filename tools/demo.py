#!/usr/bin/env python
"""See ``python tools/demo.py --help``; the same as ``vpeft demo``."""

from vpeft.cli import main

if __name__ == "__main__":
    main(command="demo")
