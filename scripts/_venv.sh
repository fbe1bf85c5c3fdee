# Sourced by quickstart.sh and test.sh: makes or refreshes a virtual environment.
#
#   PYTHON  the interpreter; by default the first of python3.12, python3.11, python3 that runs and
#           is 3.11 or newer
#   VENV    the folder, .venv by default

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.12 python3.11 python3}; do
    # Run it: a version manager's shim can be on the PATH for a version that is not active.
    if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return
    fi
  done
  echo "No Python of version 3.11 or newer found (tried: ${PYTHON:-python3.12 python3.11 python3})." >&2
  echo "Set PYTHON to one." >&2
  return 1
}

# prepare_venv EXTRAS: installs the project and its EXTRAS (comma-separated), where that is not done.
prepare_venv() {
  local extras="$1" python stamp target
  python="$(find_python)"
  VENV="${VENV:-.venv}"
  # What the environment was made from; any difference makes a new installation.
  stamp="$("$python" -VV) $python $extras $(cat setup.py pyproject.toml constraints.txt | cksum)"
  if [[ -x "$VENV/bin/python" && "$(cat "$VENV/.stamp" 2>/dev/null)" == "$stamp" ]]; then
    return
  fi
  if [[ "$(head -n 1 "$VENV/.python" 2>/dev/null)" != "$("$python" -VV) $python" ]]; then
    "$python" -m venv --clear "$VENV"
    echo "$("$python" -VV) $python" > "$VENV/.python"
  fi
  rm -f "$VENV/.stamp"
  target="."
  [[ -n "$extras" ]] && target=".[$extras]"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e "$target"
  echo "$stamp" > "$VENV/.stamp"
}
