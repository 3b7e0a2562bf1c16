#!/usr/bin/env bash
# One process: tools/train.sh CFG [key=value …]
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: $0 CFG [key=value …]" >&2; exit 2; }
cfg=$1; shift
exec python "$(dirname "$0")/train.py" --cfg "$cfg" "$@"
