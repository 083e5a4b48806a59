# shellcheck shell=bash
# Sourced by the batch scripts: the one place that knows this cluster, srun, where the ranks meet,
# NCCL and caches. Needs bash 4.4.
#
# Taken from the environment, all optional:
#   SOFTPROMPT_MASTER_ADDR  where the ranks meet; default: the job's first node
#   SOFTPROMPT_SCRATCH      node-local folder for temporary files; default: /tmp
#   TORCH_EXTENSIONS_DIR    compiled extensions; default: the attempt's own folder on each node, as a
#                           build that was killed leaves a lock that others wait for. What earlier
#                           attempts have compiled is copied there (parallel/extensions.py)
# and what until_done.sh takes.

umask 077                                       # logs and checkpoints are not everybody's business
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"    # EDIT: 0 if compute nodes reach the hub

# EDIT: how this cluster gives you the environment, e.g.
#   module load cuda
#   source "$HOME/softprompt/.venv/bin/activate"

srun_options=()    # EDIT: for your srun, e.g. of pyxis (--container-image=softprompt.sqsh)
container=()       # EDIT: in front of python, e.g. (apptainer exec --nv "$HOME/softprompt.sif")

# EDIT: only where the ranks do not find each other
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# shellcheck source=slurm/until_done.sh
source "${BASH_SOURCE[0]%/*}/until_done.sh"

scratch=    # this attempt's folder for temporary files, of one name on all nodes

# run_on_every_gpu RUN_DIR MODULE ARGUMENT...: python -m MODULE ARGUMENT... as one task per GPU.
# Each task turns Slurm's variables into RANK and its siblings itself (parallel/join.py), so that
# nothing here is expanded before srun has placed the task. Sets `status` to what srun ended with.
run_on_every_gpu() {
    local run_dir=$1
    shift
    choose_meeting_point
    make_caches
    set_up_nccl "$run_dir"
    export SOFTPROMPT_OUTCOME=$run_dir
    # Since Slurm 22.05 srun no longer takes --cpus-per-task over from sbatch by itself.
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    # shellcheck disable=SC2016  # expanded in the task, on its node
    local in_task='mkdir -p -- "$TMPDIR" && [[ -O $TMPDIR && ! -L $TMPDIR ]] || {
        echo "$TMPDIR belongs to somebody else" >&2; exit 1; }; exec "$@"'
    run_and_pass_signals_on srun --export=ALL --kill-on-bad-exit=1 --wait=60 \
        --unbuffered "${srun_options[@]}" \
        "${container[@]}" bash -c "$in_task" _ python -u -m "$@"
    remove_caches
}

choose_meeting_point() {
    local hosts
    hosts=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?not inside a Slurm job}")
    export MASTER_ADDR=${SOFTPROMPT_MASTER_ADDR:-${hosts%%$'\n'*}}
    # Another port after each requeue: somebody may sit on the last, be it a rank on a lost node.
    export MASTER_PORT=$((20000 + (SLURM_JOB_ID + 1009 * ${SLURM_RESTART_COUNT:-0}) % 20000))
    say "the ranks meet at $MASTER_ADDR:$MASTER_PORT"
}

make_caches() {
    scratch=$(mktemp -d "${SOFTPROMPT_SCRATCH:-/tmp}/softprompt-$attempt-XXXXXXXX")
    export TMPDIR=$scratch
    export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$scratch/torch_extensions}
}

remove_caches() {
    [[ -n $scratch ]] || return 0
    # On the other nodes, too, unless Slurm is about to kill whatever is started there.
    if ((${SLURM_NNODES:-1} > 1)) && [[ $received != *TERM* ]]; then
        timeout 20 srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 rm -rf -- "$scratch" || true
    fi
    rm -rf -- "$scratch"
    scratch=
}

# A rank that hangs writes what NCCL was doing and ends (lifecycle/watchdog.py), long before NCCL's own
# limit; should that be reached, NCCL writes the same files.
set_up_nccl() {
    mkdir -p -- "$1/stacks"
    export TORCH_NCCL_ASYNC_ERROR_HANDLING=3 TORCH_NCCL_DUMP_ON_TIMEOUT=1
    export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-20000}
    export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$1/stacks/nccl-rank-}
}
