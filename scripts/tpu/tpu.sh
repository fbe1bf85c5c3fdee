#!/usr/bin/env bash
# Trains on one Cloud TPU slice, by queued resources. The guide is docs/launch.md.
#
#   bash scripts/tpu/tpu.sh VERB [arguments of scripts/train.py]
#
#   create                       asks for the slice, and waits until it is there
#   setup                        installs commit COMMIT of this repository on all its workers
#   submit ARGUMENTS             starts scripts/train.py ARGUMENTS on all workers, and returns
#   status                       state of the slice, and of the run on each worker
#   logs                         follows the log of worker WORKER
#   stop                         SIGTERM: the run saves a checkpoint and ends
#   resume-until-done ARGUMENTS  create, setup and submit, again after every preemption, until the
#                                run has ended with 0; 2 (an error of the user) ends it as well
#   delete                       gives the slice back; until then it costs money
#
# DRY_RUN=1 prints the commands, runs none of them, and needs no gcloud. One slice; multi-slice is
# not supported.
set -euo pipefail

# ---- settings, from the environment
PROJECT="${PROJECT:-}"                    # Google Cloud project
ZONE="${ZONE:-}"                          # such as us-west4-a
TPU_NAME="${TPU_NAME:-}"                  # your name for the slice
ACCELERATOR_TYPE="${ACCELERATOR_TYPE:-}"  # v4-128, v5litepod-8 (v5e), v5p-64, v6e-16, ...
RUNTIME_VERSION="${RUNTIME_VERSION:-}"    # of the VM image; by default the one for the type
PROVISIONING="${PROVISIONING:-spot}"      # spot, on-demand or reserved
CREATE_FLAGS="${CREATE_FLAGS:-}"          # more flags of `queued-resources create`: --network=...
COMMIT="${COMMIT:-HEAD}"                  # what to install; it need not be pushed anywhere
SCRIPT="${SCRIPT:-scripts/train.py}"      # what to run: scripts/evaluate.py, ...
WORKER="${WORKER:-0}"                     # whose log `logs` follows
POLL_SECONDS="${POLL_SECONDS:-60}"        # between two looks at the slice and the run
MAX_FAILURES="${MAX_FAILURES:-5}"         # in a row, preemptions not counted, before giving up
FIRST_DELAY="${FIRST_DELAY:-30}"          # seconds before the next attempt, doubled every time
LONGEST_DELAY="${LONGEST_DELAY:-900}"     # up to this
DRY_RUN="${DRY_RUN:-}"

usage() { awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "${BASH_SOURCE[0]}"; }

say() { echo "tpu.sh: $*" >&2; }

# need NAME...: ends with a message where one of the settings is missing.
need() {
  local name missing=()
  for name in "$@"; do [[ -n "${!name}" ]] || missing+=("$name"); done
  [[ ${#missing[@]} -eq 0 ]] && return
  say "not set: ${missing[*]}. See the settings at the top of scripts/tpu/tpu.sh; for example:"
  say "export PROJECT=my-project ZONE=us-west4-a TPU_NAME=my-run ACCELERATOR_TYPE=v5litepod-8"
  exit 2
}

source "$(dirname "${BASH_SOURCE[0]}")/../_run.sh"

queued() { run gcloud compute tpus queued-resources "$1" "$TPU_NAME" "${@:2}" "${WHERE[@]}"; }

# on_workers WHICH COMMAND: by ssh; WHICH is a number or `all`.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" --worker="$1" --command="$2" "${WHERE[@]}"
}

# https://cloud.google.com/tpu/docs/runtimes
runtime_version() {
  case "$ACCELERATOR_TYPE" in
    v[234]-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *)
      say "no runtime version is known for ACCELERATOR_TYPE=$ACCELERATOR_TYPE, only for v4-N," \
        "v5litepod-N for v5e, v5p-N and v6e-N. Set RUNTIME_VERSION. (TPU7x is for GKE: jobset.sh.)"
      return 2
      ;;
  esac
}

check_provisioning() {
  case "$PROVISIONING" in
    spot | on-demand | reserved) ;;
    *) say "PROVISIONING must be spot, on-demand or reserved, not $PROVISIONING."; exit 2 ;;
  esac
}

request_slice() {
  local flags=(--node-id="$TPU_NAME" --accelerator-type="$ACCELERATOR_TYPE"
    --runtime-version="$RUNTIME_VERSION")
  [[ "$PROVISIONING" == on-demand ]] || flags+=("--$PROVISIONING")  # on demand has no flag
  # shellcheck disable=SC2206  # several flags in one setting
  flags+=($CREATE_FLAGS)
  queued create "${flags[@]}"
}

# READY, GONE (has to be deleted and made again), NONE, or what it is waiting for.
slice_state() {
  local answer
  if ! answer="$(queued describe --format='value(state.state)' 2>&1)"; then
    if [[ "$answer" == *NOT_FOUND* ]]; then echo NONE; return; fi
    say "$answer"
    echo UNKNOWN
    return
  fi
  case "${answer##*$'\n'}" in
    FAILED | SUSPENDED) echo GONE ;;
    ACTIVE)
      # The node of a slice that was preempted can be seen before the queued resource tells.
      answer="$(run gcloud compute tpus tpu-vm describe "$TPU_NAME" --format='value(state)' \
        "${WHERE[@]}" 2>/dev/null)" || answer=UNKNOWN
      case "$answer" in
        PREEMPTED | TERMINATED | STOPPED) echo GONE ;;
        *) echo "$answer" ;;
      esac
      ;;
    *) echo "${answer##*$'\n'}" ;;
  esac
}

# Returns 1 where the slice was lost on the way, 2 where gcloud fails again and again.
wait_for_slice() {
  local state before="" unknown=0
  if [[ -n "$DRY_RUN" ]]; then
    queued describe --format='value(state.state)'
    echo "# ... every $POLL_SECONDS s until it is ACTIVE"
    return
  fi
  while true; do
    state="$(slice_state)"
    [[ "$state" == "$before" ]] || say "$(date '+%F %T') $TPU_NAME is $state"
    before="$state"
    case "$state" in
      READY) return 0 ;;
      GONE | NONE) return 1 ;;
      UNKNOWN)
        unknown=$((unknown + 1))
        [[ $unknown -lt 10 ]] || return 2
        ;;
      *) unknown=0 ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

create() {
  request_slice
  wait_for_slice
}

# The archive of a commit: what the workers run is what git knows, whoever may read the repository.
setup() {
  local archive="${TMPDIR:-/tmp}/distill-$COMMIT.tar.gz"
  run git -C "$ROOT" archive --format=tar.gz --output="$archive" "$COMMIT" || return
  run gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:distill.tar.gz" --worker=all \
    "${WHERE[@]}" || return
  on_workers all "rm -rf distill && mkdir distill && tar -xzf distill.tar.gz -C distill &&\
 bash distill/scripts/tpu/worker.sh setup"
}

submit() {
  # auto: TPU VMs know their neighbours. Quoted twice: for this shell and for the worker's.
  on_workers all "bash distill/scripts/tpu/worker.sh start $SCRIPT\
 --coordinator_address=auto ${*@Q}"
}

status() {
  queued describe --format='value(state.state)'
  on_workers all "bash distill/scripts/tpu/worker.sh state"
}

delete() { queued delete --force --quiet; }

# The run on all workers as one word: running, none, unreachable, or an exit code.
outcome() {
  local said states
  if ! said="$(on_workers all "bash distill/scripts/tpu/worker.sh state" 2>/dev/null)"; then
    echo unreachable
    return
  fi
  states="$(sed -n 's/.*distill-state: //p' <<<"$said" | sort -u)"
  # A worker ends by itself soon after another one has: wait for all.
  if grep -qx running <<<"$states"; then echo running
  elif grep -qx none <<<"$states" || [[ -z "$states" ]]; then echo none
  elif grep -qx 'exit 2' <<<"$states"; then echo 2
  elif grep -qx 'exit 75' <<<"$states"; then echo 75
  else grep -o '[0-9]*$' <<<"$states" | sort -n | tail -n 1
  fi
}

# Waits while the run goes on; sets `result` to its exit code, or to `lost`.
follow() {
  local silent=0
  while true; do
    result="$(outcome)"
    case "$result" in
      running) silent=0 ;;
      none) result=lost; return ;;
      unreachable)
        silent=$((silent + 1))
        case "$(slice_state)" in GONE | NONE) result=lost; return ;; esac
        [[ $silent -lt 10 ]] || return 0
        ;;
      *) return ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

resume_until_done() {
  if [[ -n "$DRY_RUN" ]]; then
    create
    setup
    submit "$@"
    on_workers all "bash distill/scripts/tpu/worker.sh state"
    echo "# ... every $POLL_SECONDS s. Exit 0 or 2: done. Others: setup and submit again."
    echo "# Where the slice was preempted, suspended or has failed: this, and all of it again."
    delete
    return
  fi
  local failures=0 delay=$FIRST_DELAY result
  while true; do
    result=""
    case "$(slice_state)" in
      GONE) { say "the slice was taken away"; delete && request_slice; } || result=failed ;;
      NONE) request_slice || result=failed ;;
    esac
    if [[ -z "$result" ]]; then
      wait_for_slice || { [[ $? -eq 1 ]] && result=lost || result=failed; }
    fi
    if [[ -z "$result" ]]; then
      if [[ "$(outcome)" == running ]]; then
        say "a run is going on there already: following it"
        follow
      elif setup && submit "$@"; then
        delay=$FIRST_DELAY
        follow
      else
        result=failed
      fi
    fi
    say "$(date '+%F %T') result: $result"
    case "$result" in
      0)
        say "the run has finished. The slice still costs money: bash scripts/tpu/tpu.sh delete"
        return 0
        ;;
      2)
        say "an error in the settings; trying again would not help. The end of the log:"
        on_workers "$WORKER" "tail -n 20 distill-run/log" || true
        return 2
        ;;
      75 | lost) failures=0 ;;
      *)
        failures=$((failures + 1))
        if [[ $failures -ge $MAX_FAILURES ]]; then
          say "$failures failures in a row: giving up. The slice still costs money: look at the" \
            "log (tpu.sh logs), then delete it."
          return 1
        fi
        ;;
    esac
    say "again in $delay s"
    sleep "$delay"
    delay=$((delay * 2 < LONGEST_DELAY ? delay * 2 : LONGEST_DELAY))
  done
}

verb="${1:-}"
[[ $# -eq 0 ]] || shift
case "$verb" in
  create | setup | submit | status | logs | stop | resume-until-done | delete) ;;
  -h | --help | help) usage; exit 0 ;;
  *) say "unknown verb '$verb'"; usage >&2; exit 2 ;;
esac
need PROJECT ZONE TPU_NAME
WHERE=(--project="$PROJECT" --zone="$ZONE")
case "$verb" in
  create | resume-until-done)
    need ACCELERATOR_TYPE
    check_provisioning
    RUNTIME_VERSION="${RUNTIME_VERSION:-$(runtime_version)}"
    ;;
esac
case "$verb" in
  setup | resume-until-done)
    # Once, so that a run that is resumed in a week still has the code that it began with.
    ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
    COMMIT="$(git -C "$ROOT" rev-parse --short=12 "$COMMIT^{commit}")"
    [[ -z "$(git -C "$ROOT" status --porcelain)" ]] ||
      say "commit $COMMIT is installed; changes that are not committed stay here"
    ;;
esac
case "$verb" in
  submit | resume-until-done)
    if [[ $# -eq 0 ]]; then
      say "$verb needs the arguments of $SCRIPT, for example --gin_file=t5_1_1/base.gin ..."
      exit 2
    fi
    ;;
  *)
    if [[ $# -gt 0 ]]; then say "$verb takes no arguments, not: $*"; exit 2; fi
    ;;
esac
case "$verb" in
  logs) on_workers "$WORKER" "tail -n 100 -F distill-run/log" ;;
  stop) on_workers all "bash distill/scripts/tpu/worker.sh stop" ;;
  resume-until-done) resume_until_done "$@" ;;
  *) "$verb" "$@" ;;
esac
