#!/bin/bash
# Distil one student on several nodes: sbatch slurm-distill.sh STUDENT TEACHER RECIPE OUT
#
# Not yet tried on a cluster. All four lie on a file system that every node sees; OUT's state beside it, too. The same command
# again continues from the newest complete checkpoint. The recipe's global_batch must be a multiple
# of micro_batch x nodes x GPUs. Every process tokenises the text for itself, below $TMPDIR.
#SBATCH --job-name=paretron-distill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# Five minutes before time is up every process is asked to stop: it saves after its step.
#SBATCH --signal=TERM@300
set -euo pipefail

student=$1 teacher=$2 recipe=$3 out=$4
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# A process that dies ends the others; this script again goes on from the newest checkpoint.
srun torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
  --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
  -m paretron distill "$student" --teacher "$teacher" --recipe "$recipe" --out "$out"
