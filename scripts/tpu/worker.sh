#!/usr/bin/env bash
# What tpu.sh runs on each worker of a slice, where this repository lies in ~/distill.
#
#   worker.sh setup            installs into ~/distill-venv
#   worker.sh start ARGUMENTS  starts python ARGUMENTS; it outlives the ssh session
#   worker.sh state            prints "distill-state: running", "none" or "exit CODE"
#   worker.sh stop             SIGTERM, and waits for the end
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

VENV="$HOME/distill-venv"
RUN="$HOME/distill-run"  # pid, exit, log

setup() {
  if [[ ! -x "$VENV/bin/python" ]]; then
    # The images have Python 3.10. uv brings a newer one without the system's package manager, which
    # is locked by the first updates of a new VM.
    python3 -m pip install --quiet --user uv
    "$HOME/.local/bin/uv" venv --quiet --python 3.12 --seed "$VENV"
  fi
  # jax[tpu] asks for the libtpu of its own version; the pin is for compiling without a TPU.
  grep -v '^libtpu==' constraints.txt > "$HOME/distill-constraints.txt"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
    -c "$HOME/distill-constraints.txt" -e ".[tpu]"
  "$VENV/bin/python" -c 'import distill, jax; print(distill.__version__, "jax", jax.__version__)'
}

state() {
  if [[ -f "$RUN/exit" ]]; then
    echo "exit $(<"$RUN/exit")"
  elif [[ ! -f "$RUN/pid" ]]; then
    echo none
  elif kill -0 "$(<"$RUN/pid")" 2>/dev/null; then
    echo running
  else
    echo "exit 137"  # gone without a word: the VM was restarted, or the kernel killed it
  fi
}

start() {
  if [[ "$(state)" == running ]]; then
    echo "A run is going on here; stop it first." >&2
    exit 1
  fi
  mkdir -p "$RUN"
  rm -f "$RUN/pid" "$RUN/exit"
  setsid bash scripts/tpu/worker.sh supervise "$@" >> "$RUN/log" 2>&1 < /dev/null &
  until [[ -f "$RUN/pid" ]]; do sleep 0.1; done
  echo "started; log: $RUN/log"
}

supervise() {
  local pid code
  trap : TERM  # a shutdown signals this shell too; it has to outlive python to write the code
  echo "==== $(date '+%F %T') $*"
  "$VENV/bin/python" "$@" &
  pid=$!
  echo "$pid" > "$RUN/pid"
  while true; do
    code=0
    wait "$pid" || code=$?
    kill -0 "$pid" 2>/dev/null || break  # otherwise it was the trap that ended `wait`
  done
  echo "$code" > "$RUN/exit"
}

stop() {
  if [[ "$(state)" == running ]]; then
    kill -TERM "$(<"$RUN/pid")"
    while [[ "$(state)" == running ]]; do sleep 1; done
  fi
}

case "${1:-}" in
  setup | start | supervise | stop) "$@" ;;
  state) echo "$(hostname) distill-state: $(state)" ;;
  *) echo "worker.sh: unknown verb '${1:-}'" >&2; exit 2 ;;
esac
