#!/usr/bin/env bash
# Records tests/goldens for this machine's platform: L2_Golden_Losses.sh under the vector units, libraries' kernels and threads that other
# machines may have. Look at the difference in git before it is committed: why has each number moved?
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
RUNS=$(mktemp -d "${TMPDIR:-/tmp}/nemo_opt_goldens.XXXXXX")
trap 'rm -rf "$RUNS"' EXIT
unset NEMO_OPT_FORK_SERVER # ranks would have the kernels that the server has chosen

run() {
    local name=$1
    shift
    # It ends by comparing with what is replaced here; what counts is that it comes so far.
    env "$@" NEMO_OPT_TIMEOUT_SCALE=5 OUT="$RUNS/$name" bash tests/functional/L2_Golden_Losses.sh >"$RUNS/$name.log" 2>&1 || true
    if ! grep -q "distil five steps: exit code 0" "$RUNS/$name.log"; then
        cat "$RUNS/$name.log" >&2
        exit 1
    fi
    echo "$name: $* done"
}

run native-1 OMP_NUM_THREADS=1
run native-2 OMP_NUM_THREADS=2
run avx2-1 ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1
run avx2-2 ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=2
run scalar-1 ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=1
run scalar-2 ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=2

record() {
    local name=$1 result=$2
    shift 2
    "$PYTHON" -m nemo_opt.testing.goldens record "$name" "$RUNS"/*-[12]/"$result" --keys "$@" --varied \
        "ATEN_CPU_CAPABILITY (default, avx2, the machine's own) with MKL_CBWR and ONEDNN_MAX_CPU_ISA alike, OMP_NUM_THREADS 1 and 2"
}

record train train/metrics.jsonl loss grad_norm validation_loss
record ptq ptq.json loss_before loss_after sqnr.weights.median sqnr.activations.median quantizers bits_per_weight
record prune prune.json loss_after parameters kept_layers
record distill distill/metrics.jsonl logits_loss intermediate_loss grad_norm
