#!/usr/bin/env python
"""See ``python tools/suite.py --help``; the same as ``vpeft suite``."""

from vpeft.cli import main

if __name__ == "__main__":
    main(command="suite")
