# Sourced by demo.sh and test.sh: a virtual environment in .venv with one requirements file.
# usage: . scripts/environment.sh REQUIREMENTS

python=""
for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
  if command -v "$candidate" >/dev/null &&
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "error: Python 3.11 or newer is needed (apt install python3 python3-venv)" >&2
  exit 1
fi
if [ ! -x .venv/bin/pip ] && ! "$python" -m venv .venv; then
  echo "error: no virtual environment could be made (apt install python3-venv)" >&2
  exit 1
fi
install_cpu_torch() { # REQUIREMENTS
  # PyPI's torch for Linux brings gigabytes of CUDA that no test uses. The CPU build has an index of
  # its own; where that does not answer at once, PyPI's will do.
  local index=https://download.pytorch.org/whl/cpu torch
  torch=$(grep '^torch==' "$1") && ! .venv/bin/pip show --quiet torch 2>/dev/null &&
    .venv/bin/python -c "from urllib.request import *; urlopen('$index/torch/', timeout=5)" \
      2>/dev/null &&
    .venv/bin/pip install --quiet --disable-pip-version-check --no-deps --index-url $index "$torch"
}
# The stamp holds what was installed last, so that a second run installs nothing.
if ! cat requirements*.txt pyproject.toml "$1" | cmp -s - .venv/installed-"$1"; then
  install_cpu_torch "$1" || true
  .venv/bin/pip install --quiet --disable-pip-version-check -r "$1" || exit 1
  cat requirements*.txt pyproject.toml "$1" >.venv/installed-"$1"
fi
export PATH="$PWD/.venv/bin:$PATH"
