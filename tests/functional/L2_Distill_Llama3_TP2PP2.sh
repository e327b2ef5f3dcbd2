#!/usr/bin/env bash
# Distillation at TP2PP2, with a second pair of hidden states on the first pipeline stage, which ModelOpt refuses.
# tier=L2 ranks=4 timeout=900 device=any needs=fixtures owner=@nemo_opt
# shellcheck source=tests/functional/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
fixtures

layout=TP2PP2SP
flags=(--tp_size 2 --cp_size 1 --pp_size 2 --devices 4)
elsewhere=TP1PP2
eval_flags=(--pp 2)
pairs=$'\n  - ["decoder.layers.0", "decoder.layers.1", "mse"]'
learnt=(0.12 0.94 0.8) # measured: 0.154, 0.910, 0.718; the second pair's mean square outweighs the cosine
# shellcheck source=tests/functional/distill.sh
source "$(dirname "${BASH_SOURCE[0]}")/distill.sh"
