#!/usr/bin/env bash
# Layers dropped by number at TP2PP1, with NeMo's flags: no data is read; the result is the same at TP1, TP2 and in transformers.
# tier=L2 ranks=2 timeout=600 device=any needs=fixtures owner=@nemo_opt
# shellcheck source=tests/functional/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
fixtures

drop() {
    py -m nemo_opt.scripts.gpt_prune --devices 2 --tp_size 2 --restore_path "$FIXTURES/teacher" --save_path "$OUT/pruned" \
        --result_json "$OUT/prune.json" "$@"
}

refused 2 "drop_layers [5] out of range: the model has layers 1..4" drop --drop_layers 2 5
refused 2 "keep at least one" drop --drop_layers 1 2 3 4
step "drop layers at TP2PP1" 300 drop --drop_layers 2 4
step "loss of the teacher on the same samples" 300 py -m nemo_opt.cli eval "$FIXTURES/teacher" --data "$FIXTURES/data/text" --split 99,1,0 \
    --mbs 2 --eval-batches 8 --json "$OUT/teacher.json"
step "reload at TP1, TP2 and in transformers" 300 py -m nemo_opt.testing.reload "$OUT/pruned" --data "$FIXTURES/data/text" --json "$OUT/reload.json"

check "$OUT/prune.json" 'layout == "TP2PP1"' 'kept_layers == [1, 3]' 'model_after.num_layers == 2' 'loss_before is None' 'importance_tokens is None' \
    'parameters == parameters_before - (4 - 2) * (128 * 16 * 16 + 8 * 16 * 128 + 3 * 128 * 256 + 2 * 128)'
# No loss was measured while pruning: all three ways of loading must agree, and half of the teacher must still be a language model, a worse one.
# Measured: 5.09 nats a token, 4.95 of the teacher, 7.62 for a uniform guess.
check "$OUT/reload.json" --with pruned="$OUT/prune.json" --with facts="$FIXTURES/fixtures.json" \
    --with teacher="$OUT/teacher.json" 'parameters == [pruned.parameters]' \
    'abs(losses.TP1PP1DP2 - losses.TP2PP1) < 1e-5' 'abs(transformers_loss - losses.TP2PP1) < 1e-5' 'logits_difference < 1e-5' \
    'losses.TP2PP1 < facts.loss_uniform - 1' 'losses.TP2PP1 > teacher.loss' 'transformers_config.num_hidden_layers == 2'
