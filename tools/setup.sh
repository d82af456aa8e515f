#!/usr/bin/env bash
# Make .venv in the source tree and install clinkd into it with an extra: tools/setup.sh EXTRA
# Needs Python 3.11 or newer with venv, and gcc. PYTHON=... chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --upgrade pip
.venv/bin/python -m pip install --quiet --editable ".[$1]"
