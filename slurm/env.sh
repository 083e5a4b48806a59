# shellcheck shell=bash
# Sourced by the batch scripts; the only place that knows srun.

umask 077                             # logs and checkpoints are not everybody's business
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"    # EDIT: 0 if compute nodes reach the hub

# EDIT: how this cluster gives you the environment, e.g.
#   module load cuda
#   source "$HOME/softprompt/.venv/bin/activate"

# run_on_every_gpu MODULE ARGUMENT...: python -m MODULE ARGUMENT... as one task per GPU.
# Each task turns Slurm's variables into RANK and its siblings itself (parallel/join.py), so that
# nothing here is expanded before srun has placed the task.
run_on_every_gpu() {
    local hosts
    hosts=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?not inside a Slurm job}")
    export MASTER_ADDR=${hosts%%$'\n'*}
    export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
    # Since Slurm 22.05 srun no longer takes --cpus-per-task over from sbatch by itself.
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    srun --kill-on-bad-exit=1 --wait=60 --unbuffered python -u -m "$@"
}
