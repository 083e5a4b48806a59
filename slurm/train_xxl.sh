#!/bin/bash
#SBATCH --job-name=softprompt-xxl
#SBATCH --nodes=1                     # EDIT: nodes
#SBATCH --ntasks-per-node=8           # EDIT: GPUs per node; one task per GPU, so signals reach each rank
#SBATCH --gpus-per-node=8             # EDIT: the same; not --gpus-per-task, which breaks peer access
#SBATCH --cpus-per-task=8             # EDIT: cores per node / GPUs per node
#SBATCH --mem=0                       # all memory of the node
#SBATCH --time=24:00:00               # EDIT
#SBATCH --output=softprompt-xxl-%j.log
#SBATCH --open-mode=append            # a requeued job goes on in the same log
#SBATCH --requeue
# EDIT: #SBATCH --partition=... --account=...

# sbatch slurm/train_xxl.sh                                  from the repository's root
# RECIPE=my.yaml RUN_DIR=/scratch/me/run sbatch slurm/train_xxl.sh --set seed=1
# A job that is requeued continues from the newest checkpoint in its run directory.

set -euo pipefail
source "${SLURM_SUBMIT_DIR:?submit with sbatch from the root of the repository}/slurm/env.sh"

run_on_every_gpu softprompt_dist.train \
    --recipe "${RECIPE:-t5-xxl-superglue-boolq}" \
    --deepspeed_config "${DS_CONFIG:-ds_configs/zero3_bf16.json}" \
    --run-dir "${RUN_DIR:-runs/xxl-$SLURM_JOB_ID}" "$@"
