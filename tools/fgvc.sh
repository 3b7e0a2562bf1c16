#!/usr/bin/env bash
# All five sets of FGVC with one method, going on where it stopped: tools/fgvc.sh METHOD [key=value …] [--seeds N …] [--tasks NAME …]
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: $0 METHOD [key=value …] [--seeds N …] [--tasks NAME …]" >&2; exit 2; }
exec python "$(dirname "$0")/suite.py" fgvc "$@"
