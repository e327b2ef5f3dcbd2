#!/usr/bin/env bash
# ruff, shellcheck and mypy, as tox environments.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash ci/bootstrap.sh
exec .venv/bin/tox run -q -e lint,types
