#!/usr/bin/env bash
# The broad matrices of layouts: every test marked `wide`, which `pytest tests/unit` leaves to this script (tests/unit/conftest.py).
# tier=L2 ranks=4 timeout=900 device=any needs=none owner=@nemo_opt
# shellcheck source=tests/functional/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

export OMP_NUM_THREADS=1
step "tests marked wide" 840 py -m pytest tests/unit -m wide -q --junitxml "$OUT/wide.xml"
check "$OUT/wide.xml" 'passed > 100' 'failed + errors + skipped == 0'
