#!/usr/bin/env bash
# Hugging Face -> checkpoint -> Hugging Face at TP2PP2: the same weights to the bit, and the same loss in transformers and in Megatron-Core.
# tier=L2 ranks=4 timeout=900 device=any needs=fixtures owner=@nemo_opt
# shellcheck source=tests/functional/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
fixtures

data=(--data "$FIXTURES/data/text" --split "90,10,0" --mbs 8 --eval-batches 8)
step "import at TP2PP2" 400 py -m nemo_opt.cli import "$FIXTURES/teacher-hf" "$OUT/ckpt" --tp 2 --pp 2 --json "$OUT/import.json"
step "export at TP2PP2" 400 py -m nemo_opt.cli export "$OUT/ckpt" "$OUT/hf" --tp 2 --pp 2 --json "$OUT/export.json"
step "evaluate the checkpoint" 300 py -m nemo_opt.cli eval "$OUT/ckpt" "${data[@]}" --json "$OUT/megatron.json"
step "evaluate the export" 300 py -m nemo_opt.cli eval "$OUT/hf" "${data[@]}" --json "$OUT/transformers.json"

check "$OUT/import.json" 'layout == "TP2PP2"' 'parameters == facts.teacher.parameters' --with facts="$FIXTURES/fixtures.json"
check "$OUT/export.json" 'layout == "TP2PP2"' 'parameters == facts.teacher.parameters' --with facts="$FIXTURES/fixtures.json"
check "$OUT/transformers.json" --with megatron="$OUT/megatron.json" --with facts="$FIXTURES/fixtures.json" \
    'spec == "transformers"' 'loss < facts.loss_uniform - 2' 'abs(loss - megatron.loss) < 1e-5'
for file in "$FIXTURES"/teacher-hf/*.safetensors "$FIXTURES/teacher-hf/tokenizer.json"; do
    cmp "$file" "$OUT/hf/$(basename "$file")"
    echo "ok   $(basename "$file") is the same to the bit"
done
