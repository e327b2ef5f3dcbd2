#!/usr/bin/env bash
# Rewrites ci/constraints.txt from the environment at hand: run the whole suite before committing the result.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
header="$(grep '^#' ci/constraints.txt)"
{ echo "$header"; .venv/bin/uv pip freeze --python .venv/bin/python | grep -v -e '^-e' -e ' @ '; } >ci/constraints.txt.new
mv ci/constraints.txt.new ci/constraints.txt
