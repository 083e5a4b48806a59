# shellcheck shell=bash
# Sourced by env.sh: runs a module over as many requeues as it takes, and decides by the files that
# it leaves whether there shall be another. softprompt_dist/outcome_files.py tells of these files.
#
# Taken from the environment, all optional:
#   SOFTPROMPT_AFTER         runs that must be complete before this one starts, one a line: RUN_DIR,
#                            or RUN_DIR:STEP for at least so many steps
#   SOFTPROMPT_MIN_PROGRESS  so many steps make an attempt one with progress; default: 1
#   SOFTPROMPT_MAX_ATTEMPTS  so many attempts without progress in a row are the last; default: 3
#   SOFTPROMPT_MAX_WARNED    so many that were told to end without progress, too; default: 10

attempt=${SLURM_JOB_ID:?not inside a Slurm job: submit with sbatch}.${SLURM_RESTART_COUNT:-0}
# The last element of an array has the array's own number, which would mean all elements.
slurm_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
slurm_job=${slurm_job:-$SLURM_JOB_ID}
received=       # signals that this shell was sent
interrupted=    # one of them came just now
child=          # srun, while it runs
is_requeued=

# run_until_done MODULE RUN_DIR ARGUMENT...: python -m MODULE ARGUMENT... on every GPU until
# RUN_DIR/DONE is there. Never returns:
#    0  the run is complete
#   93  nobody must start it again as it is; RUN_DIR/STOP or the log say why
#   75  it should go on, but the job cannot be queued again
#  143  Slurm ends the job, and nobody has asked this script: cancelled, preempted, a node lost
run_until_done() {
    local module=$1 run_dir=$2 began attempts warned status=0
    shift 2
    # First of all: until then a signal would end this shell, and the job with it.
    trap 'pass_on USR1' USR1
    trap 'pass_on USR2' USR2
    trap 'pass_on TERM' TERM
    trap remove_caches EXIT
    [[ $run_dir == /* ]] || run_dir=$PWD/$run_dir
    mkdir -p -- "$run_dir"
    leave_if_over
    claim_run_dir
    require_earlier_runs
    began=$(number_in "$run_dir/step")
    count_attempt
    say "$module starts at step $began"
    run_on_every_gpu "$run_dir" "$module" "$@"
    judge
}

leave_if_over() {
    [[ ! -e $run_dir/DONE ]] || finish_done
    [[ ! -e $run_dir/STOP ]] || finish_stopped
}

# One job at a time in a run directory; a requeued one finds itself there.
claim_run_dir() {
    local other
    if is_used_outside_slurm; then
        finish 93 "not started: a run that is no Slurm job is alive in $run_dir" \
            "wait for it or end it, or choose another RUN_DIR"
    fi
    for _ in 1 2 3; do
        if (set -o noclobber && echo "$SLURM_JOB_ID" >"$run_dir/job") 2>/dev/null; then return; fi
        other=$(line_of "$run_dir/job")
        [[ $other != "$SLURM_JOB_ID" ]] || return 0
        if is_on_nodes "$other"; then
            finish 93 "not started: job $other is at work in $run_dir" \
                "wait for job $other or end it (scancel $other), or choose another RUN_DIR"
        fi
        rm -f -- "$run_dir/job"
    done
    finish 93 "not started: $run_dir/job cannot be written" "see to it that it can"
}

is_used_outside_slurm() {
    grep -q '"job": ""' "$run_dir/attempt.json" 2>/dev/null &&
        [[ -n $(find "$run_dir/heartbeat.json" -mmin -1 2>/dev/null) ]]
}

is_on_nodes() {
    local states='RUNNING|COMPLETING|CONFIGURING|SUSPENDED|STOPPED|SIGNALING'
    [[ $(state_of "$1") =~ ^($states)\  ]]
}

# Slurm's afterok is not enough: a job that saved and left is COMPLETED, too.
require_earlier_runs() {
    local entry folder steps reached patience
    while IFS= read -r entry; do
        [[ -n $entry ]] || continue
        folder=$entry steps=0
        if [[ $entry =~ ^(.+):([0-9]+)$ ]]; then
            folder=${BASH_REMATCH[1]} steps=$((10#${BASH_REMATCH[2]}))
        fi
        # A network file system may show a new file late.
        for ((patience = 5; patience > 0; patience--)); do
            [[ ! -e $folder/DONE ]] || break
            sleep 1
        done
        [[ -e $folder/DONE ]] || refuse "$folder has no DONE, so that run is not complete"
        reached=$(number_in "$folder/DONE")
        ((reached >= steps)) || refuse "$folder ended at step $reached, but $steps are needed"
    done <<<"${SOFTPROMPT_AFTER-}"
}

refuse() {
    write_file "$run_dir/why" "fatal: $1"
    finish 93 "not started: $1" "complete it, then submit again with RUN_DIR=${run_dir@Q}"
}

# Counted before it runs: an attempt that takes its node along cannot count itself.
count_attempt() {
    attempts=$(number_in "$run_dir/no_progress") warned=$(number_in "$run_dir/no_progress" 3)
    if ((began - $(number_in "$run_dir/no_progress" 2) >= ${SOFTPROMPT_MIN_PROGRESS:-1})); then
        attempts=0 warned=0
    fi
    give_up_after_too_many
    write_file "$run_dir/no_progress" "$((attempts + 1))"$'\n'"$began"$'\n'"$warned"
    write_file "$run_dir/why" running
}

# run_and_pass_signals_on COMMAND...: sets `status` to what it ended with.
run_and_pass_signals_on() {
    local name
    if [[ -n $received ]]; then
        status=0    # nothing is started that would only have to end
        return
    fi
    "$@" &
    child=$!
    # Sent in between. Not passed on at once: what has been forked and is not srun yet hears nothing.
    [[ -z $received ]] || sleep 1
    for name in $received; do kill -s "$name" "$child" || true; done
    # A trapped signal ends `wait`, not the child: the ranks are saving.
    while :; do
        interrupted='' status=0
        wait "$child" || status=$?
        [[ -n $interrupted ]] || break
    done
    child=
}

# pass_on SIGNAL: the ranks save at their next boundary and end.
pass_on() {
    received+=" $1" interrupted=yes
    [[ -z $child ]] || kill -s "$1" "$child" 2>/dev/null || true
    say "SIG$1: the ranks save and end"
    # The warning came too late, or a rank hangs: all will be killed soon, this shell included.
    if [[ $1 == TERM && $(state_of "$slurm_job") == *\ TimeLimit ]]; then ask_to_requeue; fi
}

# The attempt has ended: what now?
judge() {
    local step why is_calm=
    leave_if_superseded
    step=$(number_in "$run_dir/step") why=$(line_of "$run_dir/why")
    say "steps $began to $step; srun ended with $status; signals here:${received:- none}; $why"
    [[ ! -e $run_dir/DONE ]] || finish_done
    # After a crash srun ends the other ranks by SIGTERM, and they report a signal in good faith.
    [[ -z $received && ($status -ne 0 || $why != signal:*) ]] || is_calm=yes
    tell_what_python_could_not
    if ((step - began >= ${SOFTPROMPT_MIN_PROGRESS:-1})); then
        attempts=0 warned=0
    elif [[ -n $is_calm ]]; then
        warned=$((warned + 1))
    else
        attempts=$((attempts + 1))
    fi
    write_file "$run_dir/no_progress" "$attempts"$'\n'"$step"$'\n'"$warned"
    [[ $why != fatal:* ]] || give_up "$why"
    [[ $why != stop:* && ! -e $run_dir/STOP ]] || finish_stopped
    give_up_after_too_many
    leave_to_slurm_if_ending
    requeue
}

# A node that Slurm does not hear of is lost for it, and the job starts elsewhere, while this script
# and ranks may go on. Then nothing here is theirs to decide or to write any more.
leave_if_superseded() {
    local restarts
    [[ -z $is_requeued ]] || return 0
    restarts=$(scontrol show job "$slurm_job" 2>/dev/null |
        sed -n 's/.* Restarts=\([0-9]*\).*/\1/p') || true
    # Empty: the controller does not answer, which says nothing of this job.
    [[ -n $restarts && $restarts != "${SLURM_RESTART_COUNT:-0}" ]] || return 0
    # Preempted or near a lost node: Slurm has queued the job again, and waits for this script.
    [[ -z $received || $(state_of "$slurm_job") == RUNNING\ * ]] || return 0
    finish 143 "Slurm has given this job to other nodes" "nothing to do; a later attempt goes on"
}

tell_what_python_could_not() {
    case $why in
        fatal:* | stop:* | error:* | hang:*) return ;;
        signal:*) [[ -z $is_calm ]] || return 0 ;;
    esac
    if [[ -n $is_calm ]]; then
        why="signal: SIG${received##* } before the ranks could hear it"
    else
        why="error: a rank ended without a word (srun: $status), the last to speak said: $why"
    fi
    write_file "$run_dir/why" "$why"
}

# Cancelled, preempted, out of a node: Slurm has decided already, unless it was the time limit.
leave_to_slurm_if_ending() {
    local state
    [[ $received == *TERM* ]] || return 0
    state=$(state_of "$slurm_job")
    [[ $state != RUNNING\ * && $state != *\ TimeLimit ]] || return 0
    finish 143 "Slurm ends this job ($state)" "if squeue does not show it waiting, and the run is \
to go on at step $step, submit again with RUN_DIR=${run_dir@Q}"
}

requeue() {
    local remedy="submit again with RUN_DIR=${run_dir@Q} to go on at step $step"
    for _ in 1 2 3; do
        ask_to_requeue
        [[ -z $is_requeued ]] || break
        sleep 3
    done
    [[ -n $is_requeued ]] || finish 75 "this job cannot be queued again" "$remedy"
    say "Next: nothing to do; Slurm starts this job again, and it goes on at step $step"
    # Whoever leaves now ends the job: COMPLETED or FAILED, and its dependents take that for true.
    trap 'exit 143' TERM
    for _ in {1..900}; do
        sleep 1 &
        wait "$!" || true
    done
    finish 75 "Slurm has not ended this job" "$remedy"
}

ask_to_requeue() {
    [[ -n $is_requeued ]] || ! scontrol requeue "$slurm_job" || is_requeued=yes
}

# state_of JOB: its state and Slurm's reason; empty for one that Slurm does not know.
state_of() {
    squeue --noheader --jobs="$1" --states=all --format='%A %F_%K %T %r' 2>/dev/null |
        sed -n "s/^$1 [^ ]* //p; s/^[^ ]* $1 //p" || true
}

give_up_after_too_many() {
    # Nothing went wrong, but nothing comes of it: the time limit is too short to save even once.
    ((warned < ${SOFTPROMPT_MAX_WARNED:-10})) ||
        give_up "$warned attempts in a row were told to end before they had saved anything new; \
give them more time"
    ((attempts < ${SOFTPROMPT_MAX_ATTEMPTS:-3})) ||
        give_up "$attempts attempts in a row without progress; last: $(line_of "$run_dir/why")"
}

# give_up REASON: nobody starts this run again before a human has looked at it.
give_up() {
    rm -f -- "$run_dir/no_progress"
    write_file "$run_dir/STOP" "$1"
    finish 93 "gives up: $1" "put right what is wrong, remove $run_dir/STOP, submit again with \
RUN_DIR=${run_dir@Q}"
}

finish_done() {
    finish 0 "complete at step $(number_in "$run_dir/DONE")" "nothing to do; all is in $run_dir"
}

finish_stopped() {
    finish 93 "$run_dir/STOP: $(line_of "$run_dir/STOP")" \
        "if the run is to go on, remove that file and submit again with RUN_DIR=${run_dir@Q}"
}

# finish CODE WHAT NEXT
finish() {
    say "$2"
    say "Next: $3"
    exit "$1"
}

say() {
    printf '[%(%F %T)T] [job %s] %s\n' -1 "$attempt" "$*"
}

# number_in FILE [LINE]: the whole number there; 0 where there is none.
number_in() {
    local line
    line=$(line_of "$@")
    [[ $line =~ ^[0-9]{1,15}$ ]] || line=0
    echo "$((10#$line))"
}

# line_of FILE [LINE]: default is the first; empty where there is none.
line_of() {
    sed -n "${2:-1}{p;q}" -- "$1" 2>/dev/null || true
}

# write_file FILE TEXT: whole or not at all. A disk that is away is waited for; where it stays away
# the job is decided all the same, for who leaves here by an error is not queued again.
write_file() {
    local draft=${1%/*}/.${1##*/}.$attempt pause
    for pause in 0 1 2 4 8 16 32 64; do
        ((pause == 0)) || sleep "$pause"
        if { printf '%s\n' "$2" >"$draft" && mv -fT -- "$draft" "$1"; } 2>/dev/null; then return; fi
    done
    say "$1 cannot be written; it should say: ${2//$'\n'/ }"
}
