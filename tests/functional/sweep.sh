#!/usr/bin/env bash
# What both sweeps of quantisation do; a script sets `layout` and `layout_flag`, and sources this after lib.sh and `fixtures`.
: "${layout:?}" "${layout_flag:?}" "${FIXTURES:?}"

algorithms=(block_fp8 fp8 int4 int4_awq int8 int8_sq mxfp8 nvfp4 w4a8_awq)
sweep() {
    py -m nemo_opt.cli ptq "$FIXTURES/teacher" "$OUT/sweep" --sweep "${layout_flag[@]}" --awq-block-size 64 --calibration-samples 64 \
        --data "$FIXTURES/data/text" --split 90,10,0 --mbs 8 --eval-batches 8 --report "$OUT/sweep.html" "$@"
}

step "sweep at $layout" 300 sweep

# bounds: nemo_opt/testing/ptq_study.py, Student's 99.9 % for one more model. SQNR tells formats apart; a loss that did not move at all, or an
# SQNR beyond its upper bound, is a quantizer that does nothing.
checks=("layout == \"$layout\"" "len(runs) == ${#algorithms[@]}" 'loss_before < facts.loss_uniform - 2')
for name in "${algorithms[@]}"; do
    run=runs.$name.result
    checks+=(
        "runs.$name.error is None"
        "$run.loss_after != loss_before"
        "bounds.$name.loss_change.low < $run.loss_after - loss_before < bounds.$name.loss_change.high"
        "bounds.$name.weights_db.low < $run.sqnr.weights.median < bounds.$name.weights_db.high"
        "$run.export_format == 'hf' and $run.proof.tokens > 0"
        "$run.proof.weight_error <= $run.proof.weight_bound and $run.proof.logit_error <= $run.proof.logit_bound"
        "abs($run.proof.loss_difference) <= $run.proof.loss_bound"
        # what remains is the tokenizer and the files' headers (0.14 to 0.17 MB seen)
        "0 < $run.bytes_after - $run.bits_per_parameter * parameters / 8 < 250000"
    )
done
# Bits by hand: one scale for a tensor, of 16 x 64 (TP2) or 16 x 128 weights, of 64, of a row, of 32 and of 16.
checks+=(
    '8 < runs.fp8.result.bits_per_weight < 8.01' '8.01 < runs.block_fp8.result.bits_per_weight < 8.04'
    'runs.int4.result.bits_per_weight == 4.25' 'runs.int4_awq.result.bits_per_weight == 4.25' '4.25 < runs.w4a8_awq.result.bits_per_weight < 4.26'
    '8.1 < runs.int8.result.bits_per_weight < 8.3' 'runs.int8_sq.result.bits_per_weight == runs.int8.result.bits_per_weight'
    'runs.mxfp8.result.bits_per_weight == 8.25' '4.5 < runs.nvfp4.result.bits_per_weight < 4.51'
)
# Which quantizers there are: 16 linears; inputs where they are quantised; keys and values of 4 layers, but not beside int8.
checks+=(
    'runs.fp8.result.quantizers == 2 * 16 + 8' 'runs.int4.result.quantizers == 16 + 8' 'runs.int8.result.quantizers == 2 * 16'
    'runs.w4a8_awq.result.quantizers == 3 * 16 + 8' 'runs.nvfp4.result.quantizers == 2 * 16 + 8' 'runs.block_fp8.result.quantizers == 16 + 8'
)
check "$OUT/sweep/sweep.json" --with bounds="$ROOT/nemo_opt/testing/ptq_bounds.json" --with facts="$FIXTURES/fixtures.json" "${checks[@]}"

test "$(grep -c '<svg' "$OUT/sweep.html")" -ge 20
refused 2 "exists and is not empty" sweep
