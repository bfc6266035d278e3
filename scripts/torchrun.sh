#!/usr/bin/env bash
# Train on the GPUs of one machine or several. On each of N machines, I = 0 .. N - 1:
#
#   NODES=N NODE=I HEAD=first-host scripts/torchrun.sh --config configs/mooshak-2b.yaml --mesh fsdp=-1
#
# A single machine needs none of the three. The run directory must be on a disk shared by all.
set -euo pipefail
nodes=${NODES:-1}
if [ "$nodes" -gt 1 ]; then
  place=(--nnodes "$nodes" --node-rank "$NODE" --master-addr "$HEAD" --master-port "${PORT:-29500}")
else
  place=(--standalone)
fi
# One process per GPU.
exec python -m torch.distributed.run "${place[@]}" --nproc-per-node "${PROCESSES:-gpu}" \
  -m mooshak_torch.train "$@"
