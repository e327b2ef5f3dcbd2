#!/usr/bin/env bash
# The benchmarks (benchmarks/), each beside its peer and its limit. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash ci/bootstrap.sh
exec .venv/bin/tox run -q -e bench -- "$@"
