#!/usr/bin/env bash
# The functional scripts for a device as a job matrix, for $GITHUB_OUTPUT: DEVICE=cpu|cuda matrix.sh ARGS of `nemo-opt suite list`...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash ci/bootstrap.sh >&2
.venv/bin/nemo-opt suite list --device "$DEVICE" --json "$@" | python3 ci/plan.py matrix
