#!/usr/bin/env bash
# A search with all its stages; several processes share them: tools/search.sh NPROC CFG [key=value …]
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 NPROC CFG [key=value …]" >&2; exit 2; }
nproc=$1; cfg=$2; shift 2
tool="$(dirname "$0")/search.py"
[ "$nproc" != 1 ] || exec python "$tool" --cfg "$cfg" "$@"
exec python -m torch.distributed.run --standalone --nproc_per_node "$nproc" "$tool" --cfg "$cfg" "$@"
