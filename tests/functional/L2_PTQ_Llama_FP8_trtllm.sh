#!/usr/bin/env bash
# NeMo's L2_NeMo_2_PTQ_Llama2_FP8_trtllm, as far as ModelOpt still writes TensorRT-LLM checkpoints: one rank, the layer spec local.
# tier=L2 ranks=2 timeout=600 device=any needs=fixtures owner=@nemo_opt
# shellcheck source=tests/functional/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
fixtures

ptq() {
    py -m nemo_opt.scripts.ptq -nc "$FIXTURES/teacher" -algo fp8 -calib_ds "$FIXTURES/data/text" -calib_size 32 -bs 8 -sl 128 \
        -out "$OUT/trtllm" --result_json "$OUT/ptq.json" "$@"
}

# Its weights are compared with the model's before the directory has its name.
step "quantise and export" 300 ptq --spec local
check "$OUT/ptq.json" 'export_format == "trtllm"' 'abs(loss_after - loss_before) < 0.05' 'loss_after != loss_before'
check "$OUT/trtllm/config.json" 'quantization.quant_algo == "FP8"' 'num_hidden_layers == 4'
for file in rank0.safetensors tokenizer.json; do
    test -s "$OUT/trtllm/$file"
    echo "ok   $file"
done

# What ModelOpt cannot write is refused with what can be had instead.
refused 2 "use hf (--export_format hf), which TensorRT-LLM reads too" ptq
refused 2 "got 2 ranks" ptq --spec local -ctp 2
refused 2 "inference_tp 2" ptq --spec local -itp 2
