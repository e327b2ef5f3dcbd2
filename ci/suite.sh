#!/usr/bin/env bash
# The functional scripts (tests/functional) through the suite runner. Arguments go to `nemo-opt suite run`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash ci/bootstrap.sh
exec .venv/bin/tox run -q -e l2 -- "$@"
