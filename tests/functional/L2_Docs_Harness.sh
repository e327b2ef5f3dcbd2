#!/usr/bin/env bash
# Every command of docs/harness.md, run as a newcomer would, prints what the page shows.
# tier=L2 ranks=2 timeout=900 device=cpu needs=fixtures owner=@nemo_opt
# shellcheck source=tests/functional/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

rm -rf results/endless results/endless.log results/endless.steps results/mine results/parity
step "the page" 840 asserting py -m nemo_opt.testing.documented docs/harness.md
