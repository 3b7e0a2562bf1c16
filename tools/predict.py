#!/usr/bin/env python
"""See ``python tools/predict.py --help``; the same as ``vpeft predict``."""

from vpeft.cli import main

if __name__ == "__main__":
    main(command="predict")
