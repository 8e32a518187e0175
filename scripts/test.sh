#!/usr/bin/env bash
# Makes a virtual environment, installs what the tests need and runs them.
# usage: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh requirements-dev.txt
ruff check .
ruff format --check .
# A process for each of two cores; the tests of a file share what they set up.
JAX_PLATFORMS=cpu python -m pytest --numprocesses=2 --dist=loadfile "$@"
