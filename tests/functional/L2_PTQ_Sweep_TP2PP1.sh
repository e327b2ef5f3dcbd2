#!/usr/bin/env bash
# Every algorithm on the trained teacher at TP2PP1: losses and SQNR within the bounds that five other models set, bits, exports proven; the page.
# tier=L2 ranks=2 timeout=600 device=any needs=fixtures owner=@nemo_opt
# shellcheck source=tests/functional/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
fixtures

layout=TP2PP1
layout_flag=(--tp 2)
# shellcheck source=tests/functional/sweep.sh
source "$(dirname "${BASH_SOURCE[0]}")/sweep.sh"
