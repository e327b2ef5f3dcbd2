#!/usr/bin/env bash
# Every algorithm on the trained teacher at TP1PP2: losses and SQNR within the bounds that five other models set, bits, exports proven; the page.
# tier=L2 ranks=2 timeout=600 device=any needs=fixtures owner=@nemo_opt
# shellcheck source=tests/functional/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
fixtures

layout=TP1PP2
layout_flag=(--pp 2)
# shellcheck source=tests/functional/sweep.sh
source "$(dirname "${BASH_SOURCE[0]}")/sweep.sh"
