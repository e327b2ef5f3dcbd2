#!/usr/bin/env bash
# Width and depth pruning of the trained teacher at TP1PP2, to the sizes of NeMo's test; the result loads at TP2PP1 with the same loss.
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

refused 2 "needs tp 1" prune --tp_size 2 --pp_size 1
step "prune at TP1PP2" 300 prune
step "evaluate the result at TP2PP1" 300 py -m nemo_opt.cli eval "$OUT/pruned" --tp 2 \
    --data "$FIXTURES/data/text" --split 99,1,0 --mbs 2 --eval-batches 8 --json "$OUT/eval.json"

check "$OUT/prune.json" 'layout == "TP1PP2"' 'model_after.hidden_size == 64' 'model_after.ffn_hidden_size == 128' \
    'model_after.num_attention_heads == 4' 'model_after.num_query_groups == 4' 'model_after.num_layers == 2' \
    'model_after.vocab_size == model_before.vocab_size' 'parameters < parameters_before / 2' \
    'loss_before < facts.loss_uniform - 2' 'loss_after > loss_before' 'loss_after < facts.loss_uniform + 2' \
    --with facts="$FIXTURES/fixtures.json"
# Embedding and head, then for each layer QKV, projection, gate and up, down and two norms, then the last norm; heads keep their 16 channels.
check "$OUT/prune.json" \
    'parameters == 2 * 2048 * 64 + 2 * (64 * (4 + 2 * 4) * 16 + 4 * 16 * 64 + 3 * 64 * 128 + 2 * 64) + 64'
check "$OUT/eval.json" --with pruned="$OUT/prune.json" 'layout == "TP2PP1"' 'parameters == pruned.parameters' \
    'abs(loss - pruned.loss_after) < 1e-5'
