#!/usr/bin/env bash
# Distillation of the trained teacher into a smaller student at TP1PP2: NeMo's test, its script, flags and YAML.
# tier=L2 ranks=2 timeout=900 device=any needs=fixtures owner=@nemo_opt
# shellcheck source=tests/functional/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
fixtures

layout=TP1PP2
flags=(--tp_size 1 --cp_size 1 --pp_size 2 --devices 2)
elsewhere=TP2PP1
eval_flags=(--tp 2)
learnt=(0.2 0.87 0.65) # measured: 0.247, 0.818, 0.533
# shellcheck source=tests/functional/distill.sh
source "$(dirname "${BASH_SOURCE[0]}")/distill.sh"
