#!/usr/bin/env bash
# Depth pruning by block influence at TP2PP1: the same layers and loss as at TP1PP2 from the same data, at another depth.
# tier=L2 ranks=2 timeout=600 device=any needs=fixtures owner=@nemo_opt
# shellcheck source=tests/functional/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
fixtures

prune() {
    local name=$1
    shift
    py -m nemo_opt.cli prune "$FIXTURES/teacher" "$OUT/$name" --data "$FIXTURES/data/text" --split 99,1,0 --mbs 2 --samples 32 \
        --num-layers 2 --json "$OUT/$name.json" "$@"
}

step "prune to two layers at TP2PP1" 300 prune tp --tp 2
step "the same at TP1PP2" 300 prune pp --pp 2
step "reload at TP1, TP2 and in transformers" 300 py -m nemo_opt.testing.reload "$OUT/tp" --data "$FIXTURES/data/text" --json "$OUT/reload.json"

check "$OUT/tp.json" --with pp="$OUT/pp.json" 'layout == "TP2PP1"' 'model_after.num_layers == 2' 'kept_layers == pp.kept_layers' \
    'len(kept_layers) == 2' '1 in kept_layers' 'abs(loss_after - pp.loss_after) < 1e-5' 'loss_after > loss_before' \
    'parameters == parameters_before - 2 * (128 * 16 * 16 + 8 * 16 * 128 + 3 * 128 * 256 + 2 * 128)'
check "$OUT/reload.json" --with pruned="$OUT/tp.json" 'parameters == [pruned.parameters]' 'model.num_layers == 2' \
    'abs(losses.TP1PP1DP2 - pruned.loss_after) < 1e-5' 'abs(losses.TP2PP1 - pruned.loss_after) < 1e-5' \
    'abs(transformers_loss - pruned.loss_after) < 1e-5' 'logits_difference < 1e-5' 'transformers_config.num_hidden_layers == 2'
