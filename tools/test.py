#!/usr/bin/env python
"""See ``python tools/test.py --help``; the same as ``vpeft test``."""

from vpeft.cli import main

if __name__ == "__main__":
    main(command="test")
