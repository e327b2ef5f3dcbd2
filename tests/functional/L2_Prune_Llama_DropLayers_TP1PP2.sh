#!/usr/bin/env bash
# Layers dropped by number at TP1PP2, with NeMo's flags: the stages keep one and two layers; the result is the same at TP1, TP2 and in transformers.
# tier=L2 ranks=2 timeout=600 device=any needs=fixtures owner=@nemo_opt
# shellcheck source=tests/functional/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
fixtures

drop() {
    py -m nemo_opt.scripts.gpt_prune --devices 2 --pp_size 2 --restore_path "$FIXTURES/teacher" --save_path "$OUT/pruned" \
        --result_json "$OUT/prune.json" "$@"
}

refused 2 "names a layer twice" drop --drop_layers 2 2
# With data, which NeMo's script does not need here, the loss is measured before and after.
step "drop layers at TP1PP2" 300 drop --drop_layers 2 --seq_length 128 --mbs 2 --num_train_samples 2 --data_paths 1.0 "$FIXTURES/data/text"
step "reload at TP1, TP2 and in transformers" 300 py -m nemo_opt.testing.reload "$OUT/pruned" --data "$FIXTURES/data/text" --json "$OUT/reload.json"

# Measured: the loss rises by 0.03 nats a token.
check "$OUT/prune.json" 'layout == "TP1PP2"' 'kept_layers == [1, 3, 4]' 'model_after.num_layers == 3' 'importance_tokens is None' 'loss_after > loss_before' \
    'loss_after < loss_before + 0.5' \
    'parameters == parameters_before - (4 - 3) * (128 * 16 * 16 + 8 * 16 * 128 + 3 * 128 * 256 + 2 * 128)'
check "$OUT/reload.json" --with pruned="$OUT/prune.json" 'parameters == [pruned.parameters]' \
    'abs(losses.TP1PP1DP2 - pruned.loss_after) < 1e-5' 'abs(losses.TP2PP1 - pruned.loss_after) < 1e-5' \
    'abs(transformers_loss - pruned.loss_after) < 1e-5' 'logits_difference < 1e-5' 'transformers_config.num_hidden_layers == 3'
