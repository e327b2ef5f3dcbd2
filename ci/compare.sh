#!/usr/bin/env bash
# A change against its base, in interleaved pairs on this machine: compare.sh BASE [HEAD] [OPTIONS of `nemo-opt bench compare`]. Without
# arguments, a pull request against its base. Leaves a page, a summary and JSON in results/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash ci/bootstrap.sh
[ $# -gt 0 ] || set -- "origin/${GITHUB_BASE_REF:?give BASE and HEAD: this is no pull request}" HEAD
code=0
.venv/bin/nemo-opt bench compare "$@" --html results/compare.html --markdown results/compare.md --json results/compare.json || code=$?
if [ -n "${GITHUB_STEP_SUMMARY:-}" ] && [ -f results/compare.md ]; then
  cat results/compare.md >>"$GITHUB_STEP_SUMMARY"
fi
exit "$code"
