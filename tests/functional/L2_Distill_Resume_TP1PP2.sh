#!/usr/bin/env bash
# A distillation at TP1PP2 that is ended from outside, and started again by the same command, ends to the bit where it would have ended.
# tier=L2 ranks=2 timeout=900 device=any needs=fixtures owner=@nemo_opt
# shellcheck source=tests/functional/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
fixtures

cat >"$OUT/distillation.yaml" <<'YAML'
intermediate_layer_pairs:
  - ["decoder.final_layernorm", "decoder.final_layernorm"]
  - ["decoder.layers.0", "decoder.layers.1"]
YAML

distill() {
    local name=$1
    shift
    py -m nemo_opt.scripts.gpt_train --name "$name" --log_dir "$OUT" --model_path "$FIXTURES/student" --teacher_path "$FIXTURES/teacher" \
        --kd_config "$OUT/distillation.yaml" --pp_size 2 --devices 2 --max_steps 40 --gbs 8 --mbs 4 --lr 2e-3 --warmup_steps 4 \
        --seq_length 128 --split 99,1,0 --data_paths "$FIXTURES/data/text" --log_interval 1 --val_check_interval 10 --limit_val_batches 2 \
        --result_json "$OUT/$name.json" "$@"
}

# Starts a run, and ends it as a cluster's scheduler does when it has left a checkpoint to go on from.
end_after_a_checkpoint() {
    NEMO_OPT_COVERAGE_KILLED=1 distill ended & # it leaves no data
    local process=$!
    until [[ -e $OUT/ended/checkpoint-resume/manifest.json ]]; do
        kill -0 "$process"
        sleep 0.1
    done
    kill -TERM "$(<"/proc/$process/task/$process/children")" # what the shell of this function waits for
    ! wait "$process"
}

# The loss of each step and of each validation, without what depends on the time.
losses() {
    grep -o '^{"step": [0-9]*\|"[a-z_]*loss": [-0-9.e]*\|"grad_norm": [0-9.e]*' "$OUT/$1/metrics.jsonl"
}

step "distil 40 steps" 300 distill straight
step "distil, and be ended" 300 end_after_a_checkpoint
test ! -e "$OUT/ended/checkpoint"
refused 2 "of a distillation, a training cannot go on from it" py -m nemo_opt.cli train "$OUT/trained" --resume --pp 2 \
    --checkpoint "$OUT/ended/checkpoint-resume" --data "$FIXTURES/data/text" --steps 40
step "evaluate what was left as an ordinary model" 300 py -m nemo_opt.cli eval "$OUT/ended/checkpoint-resume" --tp 2 \
    --data "$FIXTURES/data/text" --split 99,1,0 --mbs 4 --eval-batches 8 --json "$OUT/left.json"
step "the same command again" 300 distill ended

check "$OUT/straight.json" 'steps == 40' 'resumed_at == 0' 'loss_after < loss_before - 0.2' 'kd_loss_last > 0'
check "$OUT/ended.json" --with straight="$OUT/straight.json" --with left="$OUT/left.json" 'steps == 40' 'resumed_at in [10, 20, 30]' \
    'loss_after == straight.loss_after' 'kd_loss_last == straight.kd_loss_last' 'logits_loss_last == straight.logits_loss_last' \
    'intermediate_loss_last == straight.intermediate_loss_last' 'abs(loss_before - left.loss) < 1e-5' 'loss_before < straight.loss_before' \
    'parameters == straight.parameters == left.parameters'
diff <(losses straight) <(losses ended)
test "$(losses ended | grep -c '"kd_loss"')" -eq 40
diff <(cd "$OUT/straight/checkpoint/weights" && sha256sum -- *.distcp) <(cd "$OUT/ended/checkpoint/weights" && sha256sum -- *.distcp)
test ! -e "$OUT/ended/checkpoint-resume"
refused 2 "exists and is not empty" distill ended
