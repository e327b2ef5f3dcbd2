#!/usr/bin/env bash
# Distillation of the trained teacher into a smaller student at TP2PP1, by NeMo's script with NeMo's settings; the student loads at TP1PP2.
# tier=L2 ranks=2 timeout=600 device=any needs=fixtures owner=@nemo_opt
# shellcheck source=tests/functional/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
fixtures

cat >"$OUT/distillation.yaml" <<'YAML'
logit_layers: ["output_layer", "output_layer"]
intermediate_layer_pairs:
  - ["decoder.final_layernorm", "decoder.final_layernorm"]
skip_lm_loss: true
kd_loss_scale: 1.0
YAML

distill() {
    py -m nemo_opt.scripts.gpt_train --name distill --log_dir "$OUT" --model_path "$FIXTURES/student" \
        --teacher_path "$FIXTURES/teacher" --kd_config "$OUT/distillation.yaml" --tp_size 2 --pp_size 1 --devices 2 \
        --max_steps 30 --warmup_steps 3 --gbs 8 --mbs 4 --lr 2e-3 --min_lr 2e-4 --seq_length 128 --split 99,1,0 \
        --data_paths "$FIXTURES/data/text" --result_json "$OUT/distill.json" "$@"
}

refused 2 "unknown distillation setting" distill --kd_config <(echo 'kd_loss_scael: 2')
step "distil at TP2PP1" 400 distill
step "evaluate the student at TP1PP2" 300 py -m nemo_opt.cli eval "$OUT/distill/checkpoint" --pp 2 \
    --data "$FIXTURES/data/text" --split 99,1,0 --mbs 4 --eval-batches 8 --json "$OUT/eval.json"

# The teacher is not the student: its loss is lower, and the student's falls towards it.
check "$OUT/distill.json" 'steps == 30' 'teacher_loss < loss_before - 0.5' 'loss_after < loss_before - 0.1' \
    'kd_loss_last < kd_loss_first' 'kd_loss_last > 0' 'parameters == facts.student.parameters' --with facts="$FIXTURES/fixtures.json"
check "$OUT/eval.json" --with distilled="$OUT/distill.json" 'layout == "TP1PP2"' 'parameters == distilled.parameters' \
    'abs(loss - distilled.loss_after) < 1e-5'
