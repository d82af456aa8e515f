#!/usr/bin/env bash
# Install clinkd into .venv and run everything on the shipped images; arguments go to `clinkd demo`.
set -euo pipefail
cd "$(dirname "$0")/.."

tools/setup.sh demo
exec .venv/bin/clinkd demo "$@"
