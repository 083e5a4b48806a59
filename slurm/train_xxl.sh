#!/bin/bash
#SBATCH --job-name=softprompt-xxl
#SBATCH --nodes=1                     # EDIT: nodes
#SBATCH --ntasks-per-node=8           # EDIT: GPUs per node; a task each, so that signals reach all
#SBATCH --gpus-per-node=8             # EDIT: the same; --gpus-per-task would break peer access
#SBATCH --cpus-per-task=8             # EDIT: cores per node / GPUs per node
#SBATCH --mem=0                       # all memory of the node
#SBATCH --time=24:00:00               # EDIT
#SBATCH --signal=B:USR1@300           # EDIT: seconds, 2 x (slowest step + a save) or more
#SBATCH --output=softprompt-xxl-%j.log
#SBATCH --open-mode=append            # a requeued job goes on in the same log
#SBATCH --requeue
# EDIT: #SBATCH --partition=... --account=...

# Tunes a prompt. From the root of the repository:
#
#   sbatch slurm/train_xxl.sh
#   RECIPE=my.yaml RUN_DIR=/scratch/me/run sbatch slurm/train_xxl.sh -- --set seed=1
#
# RECIPE            recipe; default t5-xxl-superglue-boolq
# RUN_DIR           where the run keeps its files; default runs/xxl-JOB
# DS_CONFIG         engine; default ds_configs/replicated_bf16.json, which T5-XXL takes 31 GB of a GPU
#                   for; on smaller ones zero3_bf16.json or zero3_int8.json
# SOFTPROMPT_SLURM  folder of env.sh; default: slurm below the folder of submission
# and those that env.sh and until_done.sh tell of. Arguments go to `softprompt train`.

set -euo pipefail
scripts=${SOFTPROMPT_SLURM:-${SLURM_SUBMIT_DIR:?not inside a Slurm job: submit with sbatch}/slurm}
# shellcheck source=slurm/env.sh
source "$scripts/env.sh"
[[ ${1-} != -- ]] || shift

run_dir=${RUN_DIR:-runs/xxl-$SLURM_JOB_ID}
run_until_done softprompt_dist.train "$run_dir" \
    --recipe "${RECIPE:-t5-xxl-superglue-boolq}" \
    --deepspeed_config "${DS_CONFIG:-ds_configs/replicated_bf16.json}" \
    --run-dir "$run_dir" "$@"
