#!/usr/bin/env bash
# Width and depth pruning of the trained teacher at TP1PP2 with NeMo's own flags and sizes; reloaded at TP1 and TP2, and by transformers.
# tier=L2 ranks=2 timeout=600 device=any needs=fixtures owner=@nemo_opt
# shellcheck source=tests/functional/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
fixtures

prune() {
    py -m nemo_opt.scripts.gpt_prune --devices 2 --pp_size 2 --seq_length 128 --mbs 2 --num_train_samples 32 \
        --restore_path "$FIXTURES/teacher" --save_path "$OUT/pruned" --data_paths 1.0 "$FIXTURES/data/text" \
        --target_ffn_hidden_size 128 --target_hidden_size 64 --target_num_attention_heads 4 --target_num_query_groups 4 \
        --target_num_layers 2 --result_json "$OUT/prune.json" "$@"
}

refused 2 "target_hidden_size 129 cannot be reached from hidden_size 128: it is at most that; nearest: 128" prune --target_hidden_size 129
refused 2 "drop_layers cannot be used with other pruning parameters" prune --drop_layers 1
step "prune at TP1PP2" 300 prune
step "reload at TP1, TP2 and in transformers" 300 py -m nemo_opt.testing.reload "$OUT/pruned" --data "$FIXTURES/data/text" --json "$OUT/reload.json"

# Measured: 4.95 nats a token before and 5.85 after, 7.62 for a uniform guess; a wrong slice is near the guess or above it.
check "$OUT/prune.json" 'layout == "TP1PP2"' 'model_after.hidden_size == 64' 'model_after.ffn_hidden_size == 128' \
    'model_after.num_attention_heads == 4' 'model_after.num_query_groups == 4' 'model_after.num_layers == 2' \
    'model_after.vocab_size == model_before.vocab_size' 'parameters < parameters_before / 2' 'importance_tokens == 32 * 128' \
    'loss_before < facts.loss_uniform - 2' 'loss_after > loss_before' 'loss_after < facts.loss_uniform - 1' \
    --with facts="$FIXTURES/fixtures.json"
# Embedding and head, then for each layer QKV, projection, gate and up, down and two norms, then the last norm; heads keep their 16 channels.
check "$OUT/prune.json" \
    'parameters == 2 * 2048 * 64 + 2 * (64 * (4 + 2 * 4) * 16 + 4 * 16 * 64 + 3 * 64 * 128 + 2 * 64) + 64'
check "$OUT/reload.json" --with pruned="$OUT/prune.json" 'parameters == [pruned.parameters]' 'transformers_parameters == pruned.parameters' \
    'abs(losses.TP1PP1DP2 - pruned.loss_after) < 1e-5' 'abs(losses.TP2PP1 - pruned.loss_after) < 1e-5' \
    'abs(transformers_loss - pruned.loss_after) < 1e-5' 'logits_difference < 1e-5' \
    'transformers_config.head_dim == 16' 'transformers_config.num_key_value_heads == 4' 'transformers_config.num_attention_heads == 4'
