#!/usr/bin/env bash
# The offline benchmark, two runs at a time; goes on where it stopped. tools/benchmark.sh [--quick] [--out DIR] …
set -euo pipefail
exec python "$(dirname "$0")/benchmark.py" --processes 2 "$@"
