#!/usr/bin/env bash
# Makes a virtual environment, installs what the tests need and runs them.
# usage: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh requirements-dev.txt
ruff check .
ruff format --check .
JAX_PLATFORMS=cpu python -m pytest "$@"
