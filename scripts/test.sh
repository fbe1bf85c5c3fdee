#!/usr/bin/env bash
# Installs the project with its test tools into .venv, lints, and runs the tests.
#   bash scripts/test.sh [arguments of pytest], for example --slow or tests/test_losses.py
#   DISTILL_EXTRAS=parity,tpu-aot  more extras to install
#   PYTHON, VENV                   see _venv.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_venv.sh
prepare_venv "test${DISTILL_EXTRAS:+,$DISTILL_EXTRAS}"
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check --quiet .
# loadfile: the tests of one file share what its fixtures trained; in the order of conftest.LONG, not
# by their number. A worker that crashes is a
# failure at once: with restarts pytest-xdist can wait for ever.
"$VENV/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
  --max-worker-restart=0 "$@"
