# Sourced by quickstart.sh and test.sh.
# use_environment FILE...   creates .venv, installs these requirements files if they changed, sets $PYTHON.

fail() { echo "error: $*" >&2; exit 2; }

find_python() {
  for candidate in "${PYTHON:-}" python3 python python3.14 python3.13 python3.12 python3.11 python3.10; do
    [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue
    echo "$candidate"
    return 0
  done
  return 1
}

# On Linux, pip's own PyTorch comes with gigabytes of CUDA libraries. Where there is neither an NVIDIA GPU nor a package
# index of the user's choice, install PyTorch's CPU build first, which pip then keeps.
install_cpu_torch() { # install_cpu_torch torch==VERSION
  [ "$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1 || return 0
  [ ! -e /proc/driver/nvidia/version ] && [ ! -e /usr/lib/wsl/lib/libcuda.so.1 ] || return 0
  # not grep -q, which would end before pip does, and pip would fail
  ! "$PYTHON" -m pip config list | grep index-url >/dev/null || return 0
  ! "$PYTHON" -m pip freeze --disable-pip-version-check | grep "^$1" >/dev/null || return 0
  echo "no NVIDIA GPU here: installing PyTorch without CUDA"
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --retries 1 "$1" \
    --index-url https://download.pytorch.org/whl/cpu || echo "that failed: installing PyTorch with CUDA instead"
}

use_environment() {
  local found wanted file arguments=()
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    found=$(find_python) || fail "Python 3.10 or newer is required but was not found (set PYTHON=/path/to/python3)"
    echo "creating a virtual environment in .venv with $("$found" --version)"
    "$found" -m venv --clear .venv || fail "could not create .venv (on Debian and Ubuntu: apt install python3-venv)"
  fi
  PYTHON="$PWD/.venv/bin/python"
  wanted=$(cat "$@" && "$PYTHON" --version)
  if [ "$(cat .venv/installed-"${!#}" 2>/dev/null)" != "$wanted" ]; then
    echo "installing $* (takes a few minutes the first time)"
    for file in "$@"; do arguments+=(-r "$file"); done
    install_cpu_torch "$(grep -h '^torch==' "$@")"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "${arguments[@]}" ||
      fail "the installation of $* failed; see pip's message above, then run this script again"
    printf '%s\n' "$wanted" >.venv/installed-"${!#}"
  fi
}
