#!/usr/bin/env bash
# The test command: makes the environment if needed, then runs the unit tests (tox -e unit = pytest tests/unit). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash ci/bootstrap.sh
exec .venv/bin/tox run -q -e unit -- "$@"
