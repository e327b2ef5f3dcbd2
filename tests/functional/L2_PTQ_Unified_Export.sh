#!/usr/bin/env bash
# NeMo's L2_NeMo_2_PTQ_Unified_Export: import from Hugging Face, FP8 by NeMo's script, unified export with a sample; here at TP2, and read back.
# tier=L2 ranks=2 timeout=600 device=any needs=fixtures owner=@nemo_opt
# shellcheck source=tests/functional/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
fixtures

ptq() {
    py -m nemo_opt.scripts.ptq -nc "$OUT/ckpt" -algo "$1" -ctp 2 --devices 2 --num_nodes 1 -awq_bs 64 \
        -calib_ds "$FIXTURES/data/text" -calib_size 64 -bs 8 -sl 128 \
        --export_format hf --legacy_ckpt --generate_sample -out "$OUT/$1" --result_json "$OUT/$1.json"
}
data=(--data "$FIXTURES/data/text" --split "99,1,0" --mbs 8 --eval-batches 8)

step "import" 300 py -m nemo_opt.cli import "$FIXTURES/teacher-hf" "$OUT/ckpt"
for algorithm in fp8 int4_awq; do
    step "quantise and export at TP2: $algorithm" 300 ptq "$algorithm"
    step "read the export alone: $algorithm" 300 py -m nemo_opt.cli eval "$OUT/$algorithm" "${data[@]}" --json "$OUT/eval_$algorithm.json"
    # The proof compared files and memory before the directory had its name; its bounds are in nemo_opt/quantize/proof.py.
    check "$OUT/$algorithm.json" 'layout == "TP2PP1"' 'export_format == "hf"' 'proof.tokens > 0' 'proof.weight_error <= proof.weight_bound' \
        'proof.logit_error <= proof.logit_bound' 'abs(proof.loss_difference) <= proof.loss_bound' 'len(samples) == 2' \
        'loss_before < facts.loss_uniform - 2' 'abs(loss_after - loss_before) < 0.05' 'loss_after != loss_before' \
        'bytes_after < 0.5 * bytes_before' --with facts="$FIXTURES/fixtures.json"
    # The reader knows neither ModelOpt nor Megatron. What is not quantised was rounded to bfloat16 in the files: 8 bits of mantissa.
    check "$OUT/eval_$algorithm.json" --with ptq="$OUT/$algorithm.json" 'spec == "transformers"' 'abs(loss - ptq.loss_after) < 2e-3' \
        'bits_per_weight < 8.1'
done
refused 2 "exists and is not empty" ptq fp8

# A scale that is lost is found by the reader.
"$PYTHON" - "$OUT/fp8/model.safetensors" <<'PYTHON'
import sys

from safetensors.torch import load_file, save_file

tensors = load_file(sys.argv[1])
del tensors["model.layers.1.mlp.up_proj.weight_scale"]
save_file(tensors, sys.argv[1], metadata={"format": "pt"})
PYTHON
refused 2 "model.layers.1.mlp.up_proj" py -m nemo_opt.cli eval "$OUT/fp8" "${data[@]}"
