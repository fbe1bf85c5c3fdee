#!/usr/bin/env bash
# Installs the project into .venv and runs a small distillation on the CPU.
#   PYTHON=python3.12 bash scripts/quickstart.sh [arguments of quickstart.py]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_venv.sh
prepare_venv ""
exec "$VENV/bin/python" scripts/quickstart.py "$@"
