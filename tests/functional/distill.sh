#!/usr/bin/env bash
# What the distillations by NeMo's script do; a script sets `layout` and `flags` (gpt_train's), `elsewhere` and `eval_flags` (the layout at
# which the student is read, the command line's), `learnt` (by how much thirty steps lower its validation loss, to what share of the first
# step's they bring the losses on logits and on hidden states) and perhaps `pairs` (more lines of YAML), and sources this after lib.sh and
# `fixtures`.
: "${layout:?}" "${flags:?}" "${elsewhere:?}" "${eval_flags:?}" "${learnt:?}" "${FIXTURES:?}"

cat >"$OUT/distillation.yaml" <<YAML
logit_layers: ["output_layer", "output_layer"]
intermediate_layer_pairs:
  - ["decoder.final_layernorm", "decoder.final_layernorm"]${pairs:-}
skip_lm_loss: true
kd_loss_scale: 1.0
YAML

distill() {
    local name=$1
    shift
    py -m nemo_opt.scripts.gpt_train --name "$name" --log_dir "$OUT" --model_path "$FIXTURES/student" --teacher_path "$FIXTURES/teacher" \
        --kd_config "$OUT/distillation.yaml" --data_paths 1.0 "$FIXTURES/data/text" --index_mapping_dir "$OUT/index" --seq_length 128 \
        --split 99,1,0 --result_json "$OUT/$name.json" "$@"
}
# NeMo's L2_NeMo_2_Distill_Llama3_TP1PP2.sh, but for shorter sequences
five=(--max_steps 5 --gbs 4 --mbs 1 --warmup_steps 1 --val_check_interval 5 --log_interval 5 --limit_val_batches 2 --legacy_ckpt)
thirty=(--max_steps 30 --gbs 8 --mbs 4 --warmup_steps 3 --val_check_interval 10 --log_interval 1 --limit_val_batches 8 --lr 2e-3 --min_lr 2e-4)

refused 2 "unknown distillation setting" distill refused "${flags[@]}" "${five[@]}" --kd_config <(echo 'kd_loss_scael: 2')
step "five steps on one rank" 200 distill single "${five[@]}"
step "five steps at $layout" 200 distill split "${flags[@]}" "${five[@]}"
step "thirty steps at $layout" 400 distill distill "${flags[@]}" "${thirty[@]}" --report "$OUT/distill.html"
step "evaluate the student at $elsewhere" 300 py -m nemo_opt.cli eval "$OUT/distill/checkpoint" "${eval_flags[@]}" \
    --data "$FIXTURES/data/text" --split 99,1,0 --mbs 4 --eval-batches 8 --json "$OUT/eval.json"

# Two runs of the same numbers: 4 updates apart from the first loss to the last, 5 from one validation to the other; at most 6e-8 was seen.
same=("layout == '$layout'" 'steps == 5' "single.layout == 'TP1PP1'")
for name in kd_loss_first logits_loss_first intermediate_loss_first kd_loss_last logits_loss_last intermediate_loss_last; do
    same+=("abs($name / single.$name - 1) < 1e-5")
done
for name in teacher_loss loss_before loss_after; do
    same+=("abs($name - single.$name) < 1e-5")
done
check "$OUT/split.json" --with single="$OUT/single.json" "${same[@]}"

# The teacher is not the student: it is better by more than a nat.
check "$OUT/distill.json" --with facts="$FIXTURES/fixtures.json" 'steps == 30' 'resumed_at == 0' 'teacher_loss < loss_before - 1' \
    "loss_after < loss_before - ${learnt[0]}" "logits_loss_last < ${learnt[1]} * logits_loss_first" \
    "intermediate_loss_last < ${learnt[2]} * intermediate_loss_first" \
    'len(validation_losses) == 3' 'peak_memory_bytes > 0' 'parameters == facts.student.parameters' 'resumable is None'
check "$OUT/eval.json" --with distilled="$OUT/distill.json" "layout == '$elsewhere'" 'parameters == distilled.parameters' \
    'abs(loss - distilled.loss_after) < 1e-5'
test "$(grep -c '<svg' "$OUT/distill.html")" -eq 3
test ! -e "$OUT/distill/checkpoint-resume" # a validation at step 10 left one
