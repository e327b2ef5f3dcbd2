#!/usr/bin/env bash
# Coverage of one kind, from every rank and subprocess: coverage.sh unit|functional ARGS..., or coverage.sh combined for both together.
# Leaves results/coverage/KIND.data. Fails when the tests do, and when a measured process left no data (ci/coverage_data.py).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
kind=${1:?unit, functional or combined}
shift
folder=$PWD/results/coverage/$kind
target=$folder.data
rm -rf "$folder" "$target"
mkdir -p "$folder/marks"
export COVERAGE_FILE=$folder/.coverage # by environment: what multiprocessing starts would not read it from a command line
code=0
case $kind in
  unit)
    NEMO_OPT_COVERAGE_MARKS=$folder/marks $python -m coverage run -m pytest tests/unit -m "wide or not wide" "$@" || code=$?
    ;;
  functional)
    # every Python that a script starts measures itself, and so do the forks of the suite's server
    NEMO_OPT_COVERAGE_MARKS=$folder/marks COVERAGE_PROCESS_START=$PWD/pyproject.toml .venv/bin/nemo-opt suite run "$@" || code=$?
    ;;
  combined)
    $python -m coverage combine -q --keep --data-file="$target" results/coverage/unit.data results/coverage/functional.data
    ;;
  *)
    echo "coverage.sh: $kind is none of unit, functional, combined" >&2
    exit 2
    ;;
esac
if [ "$kind" != combined ]; then
  $python ci/coverage_data.py "$folder" || code=$((code ? code : 1))
  $python -m coverage combine -q --keep --data-file="$folder/.coverage" "$folder" # looks for files of that name
  mv "$folder/.coverage" "$target"
fi
$python -m coverage report --data-file="$target" | tee "$folder.txt" | tail -n 40
exit "$code"
