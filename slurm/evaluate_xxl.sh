#!/bin/bash
#SBATCH --job-name=softprompt-evaluate-xxl
#SBATCH --nodes=1                     # EDIT: nodes
#SBATCH --ntasks-per-node=8           # EDIT: GPUs per node; a task each, so that signals reach all
#SBATCH --gpus-per-node=8             # EDIT: the same; --gpus-per-task would break peer access
#SBATCH --cpus-per-task=8             # EDIT: cores per node / GPUs per node
#SBATCH --mem=0                       # all memory of the node
#SBATCH --time=04:00:00               # EDIT
#SBATCH --signal=B:USR1@300           # EDIT: seconds, 2 x (slowest step + a save) or more
#SBATCH --output=softprompt-evaluate-xxl-%j.log
#SBATCH --open-mode=append            # a requeued job goes on in the same log
#SBATCH --requeue
# EDIT: #SBATCH --partition=... --account=...

# Scores a prompt file. From the root of the repository:
#
#   PROMPT=runs/xxl-41/prompt/best.safetensors sbatch slurm/evaluate_xxl.sh -- --split validation
#
# PROMPT            prompt file; no default
# RECIPE            recipe; default: the one that the prompt was tuned with
# RUN_DIR           where report.md and its siblings go; default runs/evaluate-xxl-JOB
# DS_CONFIG         engine; default ds_configs/replicated_bf16.json, which T5-XXL takes 31 GB of a GPU
#                   for; on smaller ones zero3_bf16.json or zero3_int8.json
# SOFTPROMPT_SLURM  folder of env.sh; default: slurm below the folder of submission
# and those that env.sh and until_done.sh tell of. Arguments go to `softprompt evaluate`.

set -euo pipefail
scripts=${SOFTPROMPT_SLURM:-${SLURM_SUBMIT_DIR:?not inside a Slurm job: submit with sbatch}/slurm}
# shellcheck source=slurm/env.sh
source "$scripts/env.sh"
[[ ${1-} != -- ]] || shift

run_dir=${RUN_DIR:-runs/evaluate-xxl-$SLURM_JOB_ID}
run_until_done softprompt_dist.evaluate "$run_dir" \
    --prompt "${PROMPT:?no prompt: submit with PROMPT=FILE sbatch slurm/evaluate_xxl.sh}" \
    ${RECIPE:+--recipe "$RECIPE"} \
    --deepspeed_config "${DS_CONFIG:-ds_configs/replicated_bf16.json}" \
    --output "$run_dir" "$@"
