#!/usr/bin/env bash
# The main job from nothing: environment, fixtures, then PTQ, pruning and distillation of a tiny Llama at TP2 and PP2.
# Arguments go to `nemo-opt quickstart`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash ci/bootstrap.sh
.venv/bin/nemo-opt fixtures build
exec .venv/bin/nemo-opt quickstart "$@"
