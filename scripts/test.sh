#!/usr/bin/env bash
# Makes a virtual environment, installs what the tests need, and runs lint, types and tests.
# usage: bash scripts/test.sh [--all] [pytest arguments]
#   --all   every test; without it those that are not marked slow
set -euo pipefail
cd "$(dirname "$0")/.."
chosen=(-m "not slow")
if [ "${1:-}" = --all ]; then
  chosen=()
  shift
fi
. scripts/environment.sh requirements-dev.txt
ruff check .
ruff format --check .
pyright
# A process for each of two cores; the tests of a file share what they set up.
JAX_PLATFORMS=cpu python -m pytest --numprocesses=2 --dist=loadfile "${chosen[@]}" "$@"
