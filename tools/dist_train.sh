#!/usr/bin/env bash
# Several processes on one machine (GPUs where there are any): tools/dist_train.sh NPROC CFG [key=value …]
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 NPROC CFG [key=value …]" >&2; exit 2; }
nproc=$1; cfg=$2; shift 2
exec python -m torch.distributed.run --standalone --nproc_per_node "$nproc" "$(dirname "$0")/train.py" --cfg "$cfg" "$@"
