#!/usr/bin/env bash
# One node's part of a distillation over several, by torchrun: the pipeline's two stages, and as many replicas as there are ranks for.
# Expects of Slurm's environment SLURM_NNODES, SLURM_NODEID, SLURM_JOB_ID and SLURM_GPUS_ON_NODE; and HEAD_NODE, OUT on a shared file system.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=.venv/bin/python
per_node=${SLURM_GPUS_ON_NODE:-1}
ranks=$((SLURM_NNODES * per_node))
is_head=$((SLURM_NODEID == 0))

fixtures=$($python -m nemo_opt.cli fixtures build --path | tail -n 1)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
$python -m torch.distributed.run --nnodes "$SLURM_NNODES" --nproc-per-node "$per_node" --max-restarts 0 \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$HEAD_NODE:29400" --rdzv-conf "is_host=$is_head" \
  -m nemo_opt.hosts -m nemo_opt.scripts.gpt_train --name nodes --log_dir "$OUT" --result_json "$OUT/nodes.json" \
  --model_path "$fixtures/student" --teacher_path "$fixtures/teacher" --tp_size 1 --pp_size 2 \
  --devices "$per_node" --num_nodes "$SLURM_NNODES" --max_steps 20 --warmup_steps 2 --gbs $((ranks * 4)) --mbs 4 --lr 2e-3 --min_lr 2e-4 \
  --seq_length 128 --split 99,1,0 --data_paths "$fixtures/data/text" --log_interval 1

if [ "$is_head" = 1 ]; then
  $python -m nemo_opt.testing.check "$OUT/nodes.json" 'steps == 20' 'loss_after < loss_before' 'kd_loss_last > 0'
fi
