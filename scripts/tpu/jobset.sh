#!/usr/bin/env bash
# Prints the JobSet of a run on GKE: jobset.yaml with its placeholders filled. Applies nothing.
#
#   bash scripts/tpu/jobset.sh ARGUMENTS of scripts/train.py | kubectl apply -f -
set -euo pipefail

# ---- settings, from the environment
JOB_NAME="${JOB_NAME:-}"                       # your name for the run
IMAGE="${IMAGE:-}"                             # of scripts/gpu/Dockerfile with EXTRAS=tpu
# tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice or tpu-v6e-slice
TPU_ACCELERATOR="${TPU_ACCELERATOR:-}"
TPU_TOPOLOGY="${TPU_TOPOLOGY:-}"               # of the node pool: 2x4, 4x4, 2x2x4, ...
CHIPS_PER_HOST="${CHIPS_PER_HOST:-4}"          # 4 for a machine type ct5lp-hightpu-4t, ...
SERVICE_ACCOUNT="${SERVICE_ACCOUNT:-default}"  # of Kubernetes, bound to one that may use the bucket
MAX_RESTARTS="${MAX_RESTARTS:-50}"             # preemptions and crashes together
GRACE_SECONDS="${GRACE_SECONDS:-120}"          # from SIGTERM to SIGKILL; Spot nodes give less

for name in JOB_NAME IMAGE TPU_ACCELERATOR TPU_TOPOLOGY; do
  if [[ -z "${!name}" ]]; then
    echo "jobset.sh: not set: $name. See the settings at the top of scripts/tpu/jobset.sh." >&2
    exit 2
  fi
done
if [[ $# -eq 0 ]]; then
  echo "jobset.sh: give the arguments of scripts/train.py: --gin_file=t5_1_1/base.gin ..." >&2
  exit 2
fi
if [[ ! "$TPU_TOPOLOGY" =~ ^[0-9]+(x[0-9]+){1,2}$ ]]; then
  echo "jobset.sh: TPU_TOPOLOGY must look like 4x4 or 2x2x4, not $TPU_TOPOLOGY." >&2
  exit 2
fi
chips=$((${TPU_TOPOLOGY//x/*}))
if ((chips % CHIPS_PER_HOST)); then
  echo "jobset.sh: TPU_TOPOLOGY=$TPU_TOPOLOGY has $chips chips, which" \
    "CHIPS_PER_HOST=$CHIPS_PER_HOST does not divide." >&2
  exit 2
fi
# shellcheck disable=SC2034  # read by its name below
HOSTS=$((chips / CHIPS_PER_HOST))

# A list in JSON is one in YAML.
ARGUMENTS=""
for argument in --coordinator_address=auto "$@"; do
  argument="${argument//\\/\\\\}"
  ARGUMENTS+="${ARGUMENTS:+, }\"${argument//\"/\\\"}\""
done
ARGUMENTS="[$ARGUMENTS]"

text="$(<"$(dirname "${BASH_SOURCE[0]}")/jobset.yaml")"
for name in JOB_NAME IMAGE TPU_ACCELERATOR TPU_TOPOLOGY CHIPS_PER_HOST SERVICE_ACCOUNT MAX_RESTARTS \
  GRACE_SECONDS HOSTS ARGUMENTS; do
  text=${text//"\${$name}"/"${!name}"}
done
echo "$text"
