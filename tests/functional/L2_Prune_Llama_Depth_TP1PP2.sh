#!/usr/bin/env bash
# Depth pruning by block influence at TP1PP2; an uneven depth is what the pipeline's stages then hold.
# tier=L2 ranks=2 timeout=600 device=any needs=fixtures owner=@nemo_opt
# shellcheck source=tests/functional/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
fixtures

step "prune to three layers at TP1PP2" 300 py -m nemo_opt.cli prune "$FIXTURES/teacher" "$OUT/pruned" --pp 2 --data "$FIXTURES/data/text" \
    --split 99,1,0 --mbs 2 --samples 32 --num-layers 3 --json "$OUT/prune.json"
step "reload at TP1, TP2 and in transformers" 300 py -m nemo_opt.testing.reload "$OUT/pruned" --data "$FIXTURES/data/text" --json "$OUT/reload.json"

# Measured: the loss rises by 0.03 nats a token; without the first layer by 2.07.
# The first layer turns the embedding into something else: a measure that drops it is none.
check "$OUT/prune.json" 'layout == "TP1PP2"' 'model_after.num_layers == 3' 'model_after.hidden_size == 128' 'len(kept_layers) == 3' \
    '1 in kept_layers' 'loss_after > loss_before' 'loss_after < loss_before + 0.5' \
    'parameters == parameters_before - (128 * 16 * 16 + 8 * 16 * 128 + 3 * 128 * 256 + 2 * 128)'
check "$OUT/reload.json" --with pruned="$OUT/prune.json" 'parameters == [pruned.parameters]' 'model.num_layers == 3' \
    'abs(losses.TP1PP1DP2 - pruned.loss_after) < 1e-5' 'abs(losses.TP2PP1 - pruned.loss_after) < 1e-5' \
    'abs(transformers_loss - pruned.loss_after) < 1e-5' 'logits_difference < 1e-5' 'transformers_config.num_hidden_layers == 3'
