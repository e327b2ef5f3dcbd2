#!/usr/bin/env bash
# NeMo's own pruning test: its model's sizes (llama_68M), its layout and its flags. The weights are untrained, as no trained ones are public;
# what importance is worth is asserted on the trained teacher.
# tier=L2 ranks=2 timeout=900 device=any needs=fixtures owner=@nemo_opt
# shellcheck source=tests/functional/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
fixtures

step "make the model" 300 py -m nemo_opt.cli train "$OUT/llama_68M" --preset 68m --tokenizer "$FIXTURES/tokenizer" --steps 1 \
    --gbs 1 --mbs 1 --eval-batches 1 --data "$FIXTURES/data/text" --split 99,1,0 --json "$OUT/train.json"
step "prune at TP1PP2" 300 py -m nemo_opt.scripts.gpt_prune --devices 2 --pp_size 2 --seq_length 128 --mbs 2 --num_train_samples 32 \
    --restore_path "$OUT/llama_68M" --save_path "$OUT/pruned" --data_paths 1.0 "$FIXTURES/data/text" \
    --target_ffn_hidden_size 128 --target_hidden_size 64 --target_num_attention_heads 4 --target_num_query_groups 4 \
    --target_num_layers 2 --result_json "$OUT/prune.json"
step "reload at TP1, TP2 and in transformers" 300 py -m nemo_opt.testing.reload "$OUT/pruned" --data "$FIXTURES/data/text" --json "$OUT/reload.json"

check "$OUT/train.json" 'parameters == 2 * 32000 * 768 + 2 * (4 * 768 * 768 + 3 * 768 * 3072 + 2 * 768) + 768'
check "$OUT/prune.json" 'layout == "TP1PP2"' 'model_after.hidden_size == 64' 'model_after.ffn_hidden_size == 128' \
    'model_after.num_attention_heads == 4' 'model_after.num_query_groups == 4' 'model_after.num_layers == 2' 'model_before.hidden_size == 768' \
    'model_before.num_query_groups == 12' 'parameters == 2 * 32000 * 64 + 2 * (64 * (4 + 2 * 4) * 64 + 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64'
check "$OUT/reload.json" --with pruned="$OUT/prune.json" 'parameters == [pruned.parameters]' 'transformers_parameters == pruned.parameters' \
    'abs(losses.TP1PP1DP2 - pruned.loss_after) < 1e-5' 'abs(losses.TP2PP1 - pruned.loss_after) < 1e-5' \
    'abs(transformers_loss - pruned.loss_after) < 1e-5' 'logits_difference < 1e-5' 'transformers_config.head_dim == 64'
