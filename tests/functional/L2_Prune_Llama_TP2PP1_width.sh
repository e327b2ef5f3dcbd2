#!/usr/bin/env bash
# All widths at TP2PP1, which NeMo and ModelOpt refuse, with a report; the result is the same at TP1, TP2 and in transformers.
# tier=L2 ranks=2 timeout=600 device=any needs=fixtures owner=@nemo_opt
# shellcheck source=tests/functional/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
fixtures

prune() {
    py -m nemo_opt.cli prune "$FIXTURES/teacher" "$OUT/pruned" --tp 2 --data "$FIXTURES/data/text" --split 99,1,0 --mbs 2 --samples 32 \
        --hidden-size 96 --ffn-hidden-size 128 --attention-heads 4 --query-groups 2 --json "$OUT/prune.json" --report "$OUT/report.html" "$@"
}

refused 2 "is a multiple of tp 2; nearest: 126 or 128" prune --ffn-hidden-size 127
step "prune at TP2PP1" 300 prune
step "reload at TP1, TP2 and in transformers" 300 py -m nemo_opt.testing.reload "$OUT/pruned" --data "$FIXTURES/data/text" --json "$OUT/reload.json"

# Measured: 4.95 nats a token before and 5.32 after, 7.62 for a uniform guess.
check "$OUT/prune.json" 'layout == "TP2PP1"' 'model_after.hidden_size == 96' 'model_after.ffn_hidden_size == 128' \
    'model_after.num_attention_heads == 4' 'model_after.num_query_groups == 2' 'model_after.num_layers == 4' 'kept_layers == [1, 2, 3, 4]' \
    'loss_after > loss_before' 'loss_after < facts.loss_uniform - 1.5' \
    'parameters == 2 * 2048 * 96 + 4 * (96 * (4 + 2 * 2) * 16 + 4 * 16 * 96 + 3 * 96 * 128 + 2 * 96) + 96' --with facts="$FIXTURES/fixtures.json"
check "$OUT/reload.json" --with pruned="$OUT/prune.json" 'parameters == [pruned.parameters]' 'transformers_parameters == pruned.parameters' \
    'abs(losses.TP1PP1DP2 - pruned.loss_after) < 1e-5' 'abs(losses.TP2PP1 - pruned.loss_after) < 1e-5' \
    'abs(transformers_loss - pruned.loss_after) < 1e-5' 'logits_difference < 1e-5' \
    'transformers_config.head_dim == 16' 'transformers_config.num_key_value_heads == 2'
[[ $(grep -c '<svg ' "$OUT/report.html") == 5 ]]
echo "ok   the report has a plot for each axis"
