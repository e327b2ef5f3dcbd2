#!/usr/bin/env bash
# The broad matrices of layouts, and whole commands: every test marked `wide`, which `pytest tests/unit` leaves to this script (tests/unit/conftest.py).
# tier=L2 ranks=4 timeout=900 device=any needs=none owner=@nemo_opt
# shellcheck source=tests/functional/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

export OMP_NUM_THREADS=1
# Two processes: four ranks on two cores mostly wait for each other.
step "tests marked wide" 840 py -m pytest tests/unit -m wide -q -n 2 --dist loadfile --junitxml "$OUT/wide.xml"
check "$OUT/wide.xml" 'passed > 100' 'failed + errors + skipped == 0'
