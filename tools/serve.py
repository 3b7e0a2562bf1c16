#!/usr/bin/env python
"""See ``python tools/serve.py --help``; the same as ``vpeft serve``."""

from vpeft.cli import main

if __name__ == "__main__":
    main(command="serve")
