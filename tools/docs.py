#!/usr/bin/env python
"""See ``python tools/docs.py --help``; the same as ``vpeft docs``."""

from vpeft.cli import main

if __name__ == "__main__":
    main(command="docs")
