# Sourced by the launchers in gpu/ and tpu/.

# run COMMAND...: runs it; under DRY_RUN prints it instead, ready to be pasted.
run() {
  if [[ -z "${DRY_RUN:-}" ]]; then "$@"; return; fi
  local word line=()
  for word in "$@"; do
    [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="${word@Q}"
    line+=("$word")
  done
  echo "${line[*]}"
}
