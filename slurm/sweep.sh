#!/bin/bash
#SBATCH --job-name=softprompt-sweep
#SBATCH --nodes=1                     # EDIT: nodes
#SBATCH --ntasks-per-node=8           # EDIT: GPUs per node; a task each, so that signals reach all
#SBATCH --gpus-per-node=8             # EDIT: the same; --gpus-per-task would break peer access
#SBATCH --cpus-per-task=8             # EDIT: cores per node / GPUs per node
#SBATCH --mem=0                       # all memory of the node
#SBATCH --time=24:00:00               # EDIT
#SBATCH --signal=B:USR1@300           # EDIT: seconds, 2 x (slowest step + a save) or more
#SBATCH --output=softprompt-sweep-%A-%a.log
#SBATCH --open-mode=append            # a requeued job goes on in the same log
#SBATCH --requeue
# EDIT: #SBATCH --partition=... --account=...

# Tunes a prompt for each task with each seed, or scores them: an array of as many elements. From
# the root of the repository, two tasks with three seeds, four elements at a time:
#
#   TASKS="boolq cb" SEEDS="0 1 2" SWEEP_DIR=runs/sweep sbatch --array=0-5%4 slurm/sweep.sh
#   TASKS="boolq cb" SEEDS="0 1 2" SWEEP_DIR=runs/sweep SWEEP_VERB=evaluate \
#       sbatch --array=0-5 --dependency=aftercorr:JOB slurm/sweep.sh -- --split validation
#
# TASKS             words; element i has task i / seeds
# SEEDS             words; element i has seed i % seeds
# SWEEP_DIR         an element's run is in SWEEP_DIR/TASK-seedSEED; default runs/sweep-JOB
# SWEEP_VERB        train, or evaluate: the best prompt, into the run's folder evaluation
# RECIPE            recipe, in which the task takes the place of task.catalogue; default
#                   t5-xxl-superglue-boolq, with each task's own data set on the hub
# DS_CONFIG         engine; default ds_configs/replicated_bf16.json, which T5-XXL takes 31 GB of a GPU
#                   for; on smaller ones zero3_bf16.json or zero3_int8.json
# SOFTPROMPT_SLURM  folder of env.sh; default: slurm below the folder of submission
# and those that env.sh and until_done.sh tell of. Arguments go to the verb.

set -euo pipefail
scripts=${SOFTPROMPT_SLURM:-${SLURM_SUBMIT_DIR:?not inside a Slurm job: submit with sbatch}/slurm}
# shellcheck source=slurm/env.sh
source "$scripts/env.sh"
[[ ${1-} != -- ]] || shift

read -ra tasks <<<"${TASKS:?no tasks: submit with TASKS=\"boolq cb\"}"
read -ra seeds <<<"${SEEDS:?no seeds: submit with SEEDS=\"0 1 2\"}"
last=$((${#tasks[@]} * ${#seeds[@]} - 1))
element=${SLURM_ARRAY_TASK_ID:?not an array: submit with sbatch --array=0-$last}
if ((element > last)); then
    echo "No element $element: ${#tasks[@]} tasks with ${#seeds[@]} seeds are --array=0-$last" >&2
    exit 93
fi
task=${tasks[element / ${#seeds[@]}]} seed=${seeds[element % ${#seeds[@]}]}
run_dir=${SWEEP_DIR:-runs/sweep-$SLURM_ARRAY_JOB_ID}/$task-seed$seed
engine=(--deepspeed_config "${DS_CONFIG:-ds_configs/replicated_bf16.json}")
# That recipe names BoolQ's rows; a recipe of one's own may name a source that has them all.
own_rows=()
[[ -n ${RECIPE-} ]] || own_rows=(--set "task.source={kind: hub}")

case ${SWEEP_VERB:-train} in
    train)
        run_until_done softprompt_dist.train "$run_dir" \
            --recipe "${RECIPE:-t5-xxl-superglue-boolq}" "${engine[@]}" --run-dir "$run_dir" \
            "${own_rows[@]}" --set "task.catalogue=$task" --set "seed=$seed" "$@"
        ;;
    evaluate)
        SOFTPROMPT_AFTER=${SOFTPROMPT_AFTER-}$'\n'$run_dir
        run_until_done softprompt_dist.evaluate "$run_dir/evaluation" "${engine[@]}" \
            --prompt "$run_dir/prompt/best.safetensors" --output "$run_dir/evaluation" "$@"
        ;;
    *)
        echo "SWEEP_VERB=$SWEEP_VERB must be train or evaluate" >&2
        exit 93
        ;;
esac
