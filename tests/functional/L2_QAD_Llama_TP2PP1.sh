#!/usr/bin/env bash
# Quantisation-aware distillation at TP2PP1: a model that lost a layer and was quantised recovers from its unquantised original, stays
# quantised, and its export computes the same.
# tier=L2 ranks=2 timeout=900 device=any needs=fixtures owner=@nemo_opt
# shellcheck source=tests/functional/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
fixtures

printf 'intermediate_layer_pairs:\n  - ["decoder.final_layernorm", "decoder.final_layernorm"]\n' >"$OUT/distillation.yaml"
data=(--data "$FIXTURES/data/text" --split "90,10,0" --mbs 8 --eval-batches 8)
step "drop a layer" 300 py -m nemo_opt.cli prune "$FIXTURES/teacher" "$OUT/pruned" --drop-layer 3 --tp 2 "${data[@]}"
step "quantise to NVFP4" 300 py -m nemo_opt.cli ptq "$OUT/pruned" "$OUT/nvfp4" --algorithm nvfp4 --tp 2 "${data[@]}" \
    --calibration-samples 64 --json "$OUT/ptq.json"
step "distil the teacher into it" 300 py -m nemo_opt.cli distill "$OUT/nvfp4" "$FIXTURES/teacher" "$OUT/distilled" --tp 2 "${data[@]}" \
    --kd-config "$OUT/distillation.yaml" --gbs 8 --steps 30 --lr 5e-4 --json "$OUT/distill.json"
refused 2 "is quantised" py -m nemo_opt.cli distill "$FIXTURES/student" "$OUT/nvfp4" "$OUT/wrong" --tp 2 "${data[@]}" --gbs 8
step "export at TP1PP1" 300 py -m nemo_opt.cli export "$OUT/distilled" "$OUT/hf" --json "$OUT/export.json"
step "read the export alone" 300 py -m nemo_opt.cli eval "$OUT/hf" "${data[@]}" --json "$OUT/eval.json"

# Measured: 62 % of the gap to the teacher is closed, and what was minimised falls to 0.36 of the first step's.
check "$OUT/distill.json" --with ptq="$OUT/ptq.json" "layout == 'TP2PP1'" 'abs(loss_before - ptq.loss_after) < 1e-4' \
    'loss_before > teacher_loss + 0.03' 'loss_after - teacher_loss < 0.55 * (loss_before - teacher_loss)' \
    'kd_loss_last < 0.55 * kd_loss_first' 'intermediate_loss_last < intermediate_loss_first' 'parameters == ptq.parameters'
check "$OUT/eval.json" --with distilled="$OUT/distill.json" 'spec == "transformers"' 'abs(loss - distilled.loss_after) < 5e-3' \
    '4.5 <= bits_per_weight < 4.6' 'formats.NVFP4 == 3 * 7'
