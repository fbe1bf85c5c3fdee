#!/usr/bin/env bash
# Trains on the GPUs of this machine, with one process for all of them.
#
#   bash scripts/gpu/single_node.sh ARGUMENTS of scripts/train.py
#
# It exits as the run does: 0 done, 2 an error in the settings, 75 stopped by SIGTERM and saved (the
# same command goes on). DRY_RUN=1 prints the commands and runs none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# ---- settings, from the environment
PYTHON="${PYTHON:-.venv/bin/python}"  # with `pip install -c constraints.txt -e ".[cuda]"` done
SCRIPT="${SCRIPT:-scripts/train.py}"  # what to run: scripts/evaluate.py, ...
# CUDA_VISIBLE_DEVICES=0,1            # all GPUs where it is not set
# XLA_FLAGS, XLA_CLIENT_MEM_FRACTION, NCCL_DEBUG: see _env.sh

source scripts/gpu/_env.sh
if [[ $# -eq 0 ]]; then
  echo "single_node.sh: give the arguments of $SCRIPT: --gin_file=t5_1_1/base.gin ..." >&2
  exit 2
fi
if [[ -z "${DRY_RUN:-}" && ! -x "$(command -v "$PYTHON")" ]]; then
  echo "single_node.sh: PYTHON=$PYTHON is not there. Install into .venv (docs/launch.md)," \
    "or set PYTHON." >&2
  exit 2
fi
show_environment
run exec "$PYTHON" "$SCRIPT" "$@"
