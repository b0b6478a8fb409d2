#!/usr/bin/env bash
# Lint, format check and tests, in the same environment as quickstart.sh. Arguments are passed to pytest:
#   bash test.sh tests/test_model.py -k rotary
set -euo pipefail
cd "$(dirname "$0")"
source ./environment.sh
use_environment requirements.txt requirements-test.txt
"$PYTHON" -m ruff check . || fail "ruff check found the problems above"
"$PYTHON" -m ruff format --check . || fail "the files above are not formatted: run .venv/bin/ruff format"
"$PYTHON" -m pytest -n auto --maxprocesses 4 "$@" || fail "some tests failed, see above"
