#!/usr/bin/env bash
# A pruned model learns more from its teacher in 40 steps than from labels alone, and most from both: three seeds, the same samples and steps.
# tier=L2 ranks=1 timeout=600 device=any needs=fixtures owner=@nemo_opt
# shellcheck source=tests/functional/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
fixtures

# One thread: models are so small that two only wait for each other.
export OMP_NUM_THREADS=1
step "the study, three seeds" 500 py -m nemo_opt.testing.distill_study --settings half_trained --ways logits logits_labels --seeds 3 \
    --json "$OUT/study.json"

# Bounds are a third of the margins that were measured over eight seeds, 0.054 and 0.072 nats a token (docs/distillation.md): another platform trains
# another teacher. The least margin of a single seed was 0.022.
check "$OUT/study.json" 'half_trained.ways.logits.margin > 0.018' 'half_trained.ways.logits.seeds_won == 3' \
    'half_trained.ways.logits_labels.margin > 0.024' 'half_trained.ways.logits_labels.seeds_won == 3' \
    'half_trained.ways.labels.closed > 0.3' 'len(half_trained.before) == 3'
