#!/bin/bash
#SBATCH --job-name=softprompt-adapt-xxl
#SBATCH --nodes=1                     # EDIT: nodes
#SBATCH --ntasks-per-node=8           # EDIT: GPUs per node; a task each, so that signals reach all
#SBATCH --gpus-per-node=8             # EDIT: the same; --gpus-per-task would break peer access
#SBATCH --cpus-per-task=8             # EDIT: cores per node / GPUs per node
#SBATCH --mem=0                       # all memory of the node
#SBATCH --time=24:00:00               # EDIT
#SBATCH --signal=B:USR1@1800          # EDIT: seconds, 2 x (slowest step + a save) or more
#SBATCH --output=softprompt-adapt-xxl-%j.log
#SBATCH --open-mode=append            # a requeued job goes on in the same log
#SBATCH --requeue
# EDIT: #SBATCH --partition=... --account=...

# Trains all weights of a language model on plain text. From the root of the repository:
#
#   sbatch slurm/adapt_xxl.sh -- --set backbone=google/t5-v1_1-xxl --set 'corpus=[/data/c4-en]' \
#       --set batch.micro_batch_size=16 --set engine.activation_checkpointing=true
#
# RECIPE            recipe; default paper-512-512
# RUN_DIR           where the run keeps its files; default runs/adapt-xxl-JOB
# DS_CONFIG         engine; default ds_configs/adapt_zero2_bf16.json
# SOFTPROMPT_SLURM  folder of env.sh; default: slurm below the folder of submission
# and those that env.sh and until_done.sh tell of. Arguments go to `softprompt adapt`; the default
# recipe needs backbone and corpus.

set -euo pipefail
scripts=${SOFTPROMPT_SLURM:-${SLURM_SUBMIT_DIR:?not inside a Slurm job: submit with sbatch}/slurm}
# shellcheck source=slurm/env.sh
source "$scripts/env.sh"
[[ ${1-} != -- ]] || shift

run_dir=${RUN_DIR:-runs/adapt-xxl-$SLURM_JOB_ID}
run_until_done softprompt_dist.adapt "$run_dir" \
    --recipe "${RECIPE:-paper-512-512}" \
    --deepspeed_config "${DS_CONFIG:-ds_configs/adapt_zero2_bf16.json}" \
    --run-dir "$run_dir" "$@"
