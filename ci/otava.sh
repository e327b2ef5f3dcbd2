#!/usr/bin/env bash
# The power of the detector beside its rivals, Apache Otava among them, which gets an environment of its own: otava.sh [HISTORY] [OPTIONS of
# nemo_opt.perf.power].
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash ci/bootstrap.sh
env=results/otava
if [ ! -x "$env/bin/python" ]; then
  mkdir -p results
  .venv/bin/uv venv --quiet --python .venv/bin/python "$env"
  .venv/bin/uv pip install --quiet --python "$env/bin/python" "apache-otava==0.8.0" # what the table in docs/performance.md was made with
fi
exec .venv/bin/python -m nemo_opt.perf.power --otava "$env/bin/python" "$@"
