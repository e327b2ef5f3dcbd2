#!/usr/bin/env bash
# The benchmarks (benchmarks/), each beside its peer, its limit and its goal; the short set, or with --full all shapes. Arguments go to
# `nemo-opt bench run`. Leaves a page, a summary and JSON in results/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash ci/bootstrap.sh
code=0
.venv/bin/tox run -q -e bench -- "$@" --html results/performance.html --markdown results/performance.md --json results/performance.json || code=$?
if [ -n "${GITHUB_STEP_SUMMARY:-}" ] && [ -f results/performance.md ]; then
  cat results/performance.md >>"$GITHUB_STEP_SUMMARY"
fi
exit "$code"
