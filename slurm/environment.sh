# shellcheck shell=bash
# The one prologue of the Slurm templates: facts of the site, settings of the libraries, and how a job is run,
# stopped and requeued. It is sourced, by the templates and by `mae-scale submit`.

# Facts of the site. Write them here, or set them in the environment, which wins.
# Partition and account are sbatch's own variables: plain `sbatch` sees them after `source slurm/environment.sh`.
: "${SBATCH_PARTITION:=}"              # empty: the cluster's default
: "${SBATCH_ACCOUNT:=}"                # empty: your own
: "${MAE_SCALE_MODULES:=}"             # for `module load`, such as "gcc/13 cuda/13.0"
: "${MAE_SCALE_CONTAINER:=}"           # put before the command, such as "apptainer exec --nv --bind /data mae.sif"
: "${MAE_SCALE_SRUN_OPTIONS:=}"        # more for srun, such as "--mpi=none --container-image='/my images/mae.sqsh'"
: "${MAE_SCALE_SCRATCH:=${TMPDIR:-/tmp}}" # a disk of the node's own
: "${MAE_SCALE_INTERFACE:=}"           # the network between the nodes, as `ip link` names it; empty: what is found
: "${MAE_SCALE_GPU:=}"                 # for planning, as `mae-scale plan` names it, such as h100
: "${MAE_SCALE_LINK:=}"                # for planning, between nodes; empty: infiniband-8x400
templates=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${MAE_SCALE_VENV:=${VIRTUAL_ENV:-$(dirname "$templates")/.venv}}"
[ -z "$SBATCH_PARTITION" ] || export SBATCH_PARTITION
[ -z "$SBATCH_ACCOUNT" ] || export SBATCH_ACCOUNT

# Exit codes of `mae-scale`.
CODE_REFUSED=2 CODE_STOPPED=75

say() { echo "$(date +%FT%T) job ${SLURM_JOB_ID:-?}: $*"; }

# Reads the variable named $2 into the array named $1, word by word: quotes keep spaces, nothing else is special.
read_words() {
    local words
    words=$(xargs -r printf '%s\n' <<<"${!2}" 2>/dev/null) || {
        say "$2 cannot be split into words: ${!2}; expected each quote to be closed" >&2
        exit $CODE_REFUSED
    }
    mapfile -t "$1" < <(printf '%s' "${words:+$words$'\n'}")
}

container=() site_options=()
load_software() {
    if [ -n "$MAE_SCALE_MODULES" ]; then
        set +u # the shell code of modules uses variables that may be unset
        # shellcheck disable=SC2086  # several names in one variable
        module load $MAE_SCALE_MODULES
        set -u
    fi
    # After the modules, which change PATH too.
    [ ! -d "$MAE_SCALE_VENV/bin" ] || export PATH="$MAE_SCALE_VENV/bin:$PATH"
    read_words container MAE_SCALE_CONTAINER
    read_words site_options MAE_SCALE_SRUN_OPTIONS
    # In a container, also that of srun's plugin pyxis, it is looked for by whoever starts it.
    [[ ${#container[@]} -gt 0 || " ${site_options[*]}" = *" --container-"* ]] || command -v mae-scale >/dev/null || {
        say "mae-scale is not found on $(hostname); set MAE_SCALE_VENV, MAE_SCALE_CONTAINER or MAE_SCALE_MODULES"
        exit $CODE_REFUSED
    }
}

# Whether something on this node listens at a port.
is_taken() { grep -Eqsi "^ *[0-9]+: [0-9A-F]+:$(printf %04X "$1") [0-9A-F]+:[0-9A-F]+ 0A " /proc/net/tcp /proc/net/tcp6; }

# Gives the ranks the GPUs that the job has. srun asks for SLURM_GPUS_PER_NODE, which says nothing of a --gres beside
# or after it: with 0 the ranks would see no GPU, with another number srun would refuse to start them.
take_gpus() {
    [ -n "${SLURM_GPUS_PER_NODE:-}" ] || return 0
    local asked
    # Of a job array, it may show every job: they ask for the same.
    asked=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *TresPerNode=.*gres[:/]gpu[:=]\([^, ]*\).*/\1/p' | tail -n 1)
    [ -z "$asked" ] || export SLURM_GPUS_PER_NODE=$asked
}

set_environment() {
    # A rank takes its place from Slurm; what another launcher left in the submitting shell would win over it.
    unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
    # The ranks meet on the first node, where this runs. The port is below the kernel's ephemeral ones, differs between
    # jobs that share a node, and between the starts of one job: what a lost start left behind may still listen on the
    # last one. On a shared node another program may have it: then the next one that is free.
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    MASTER_PORT=$((20000 + (SLURM_JOB_ID + 997 * ${SLURM_RESTART_COUNT:-0}) % 12000))
    while is_taken "$MASTER_PORT"; do MASTER_PORT=$((20000 + (MASTER_PORT + 1 - 20000) % 12000)); done
    export MASTER_ADDR MASTER_PORT
    take_gpus

    # NCCL picks a fast network by itself, Gloo takes the address of the host name, often that of a slow management
    # network or of loopback. Where either is wrong, both are told.
    if [ -n "$MAE_SCALE_INTERFACE" ]; then
        export NCCL_SOCKET_IFNAME=$MAE_SCALE_INTERFACE GLOO_SOCKET_IFNAME=$MAE_SCALE_INTERFACE
    fi
    # Without it a failure inside NCCL reads "unhandled system error"; WARN adds one line with the cause.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # The last collectives of each rank, written when one times out: the rank that did not come is the one to look at.
    export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
    # Else each rank of a node starts a thread for every core of it.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    # Compiled kernels stay on the node: in a shared home all ranks would wait for the same lock files.
    local cache=$MAE_SCALE_SCRATCH/mae-scale-$UID
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
    # What a rank said before it was killed is in the log, not in a buffer.
    export PYTHONUNBUFFERED=1
}

# Runs a command and hands USR1 and TERM on to it as USR1, the request to stop with a checkpoint; its exit code.
supervise() {
    child='' asked=''
    # Before the command runs: a signal that comes while it is started is kept for it.
    trap 'if [ -n "$child" ]; then kill -USR1 "$child" 2>/dev/null; else asked=yes; fi' USR1 TERM
    "$@" &
    child=$!
    [ -z "$asked" ] || kill -USR1 "$child"
    # A trapped signal ends `wait`, not the child; the last `wait` has the child's own code.
    while wait "$child"; kill -0 "$child" 2>/dev/null; do :; done
    wait "$child"
}

# One rank, as srun starts it; the file $1 gets its exit code where it was refused or stopped on request. srun itself
# says only how the ranks ended that --kill-on-bad-exit had to kill. To stop is no bad exit: the others get to their end.
# A rank that srun ends because another was refused stops too, and leaves that one's verdict as it is.
run_rank() {
    local verdict=$1 code=0
    shift
    supervise "$@" || code=$?
    case $code in
        "$CODE_REFUSED") echo $code >"$verdict" ;;
        "$CODE_STOPPED") (set -o noclobber && echo $code >"$verdict") 2>/dev/null || true && code=0 ;;
    esac
    return $code
}

# The folder after --out among the arguments of `mae-scale`.
out_folder() {
    local out='' previous=''
    for argument in "$@"; do
        case $previous,$argument in
            --out,*) out=$argument ;;
            *,--out=*) out=${argument#--out=} ;;
        esac
        previous=$argument
    done
    [ -n "$out" ] || {
        say "--out DIR is missing; usage: sbatch --nodes=N TEMPLATE RECIPE --out DIR [section.key=value ...]" >&2
        return $CODE_REFUSED
    }
    echo "$out"
}

# The step of the newest checkpoint below a run's folder, 0 before the first.
newest_step() {
    local manifest step newest=0
    for manifest in "$1"/checkpoints/step_*/manifest.json; do
        step=$(basename "$(dirname "$manifest")")
        step=${step#step_}
        [[ ! $step =~ ^[0-9]+$ ]] || newest=$((10#$step))
    done
    echo "$newest"
}

# Ends the job when two starts, this one and the one before, brought no new step: a third would not either.
# $1 notes the newest step at the beginning of each start, a line a start.
stop_without_progress() {
    local before
    before=$(tail -n 2 "$1" | head -n 1)
    [ "$(wc -l <"$1")" -ge 2 ] && [ "$(newest_step "$2")" -le "$before" ] || return 0
    say "stopped, not requeued: two starts brought no step after $before; see the messages of the ranks above"
    exit 1
}

requeue() {
    # The id of a job array would requeue all of its jobs.
    local job=$SLURM_JOB_ID
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    # Slurm requeues also what was cancelled or is out of time, and the next start of this job, which runs already where
    # this node was lost to Slurm for a while.
    [[ $(scontrol show job "$job" | tr '\n' ' ') = *" JobState=RUNNING "*" Restarts=${SLURM_RESTART_COUNT:-0} "* ]] || exit "$1"
    say "$2: requeued"
    scontrol requeue "$job"
    # Slurm ends this shell; ending by itself would be the end of the job where it is slow to.
    sleep 60
    exit "$1"
}

# Runs `mae-scale ARGUMENTS` as the ranks of this job and ends the job's start: 0 done, 1 failed, 2 refused, or
# requeued. What srun_options holds goes to srun, after what the site says.
srun_options=()
run_job() {
    local out start notes verdict code=0
    out=$(out_folder "$@") || exit
    start=${SLURM_RESTART_COUNT:-0}
    notes=$out/slurm/starts_$SLURM_JOB_ID
    # One a start: a shared folder may go on saying for a while what a file was before.
    verdict=$out/slurm/verdict_${SLURM_JOB_ID}_$start
    mkdir -p "$out/slurm"
    [ "$start" != 0 ] || : >"$notes"
    stop_without_progress "$notes" "$out"
    newest_step "$out" >>"$notes"

    load_software
    set_environment
    say "start $start on $SLURM_JOB_NODELIST from step $(newest_step "$out")"
    # --kill-on-bad-exit: without a rank the others would wait in a collective until it times out.
    # --cpus-per-task: srun does not take it from sbatch (since Slurm 22.05); its ranks would have one core each.
    # --export=ALL: the ranks get the settings above also where the job was sent with --export=NONE.
    # Every rank sees all GPUs of its node and takes its own by local rank: NCCL needs to see the others for NVLink.
    # The rank's shell is told its code, not where it stands: srun may start it in a container without this file.
    # shellcheck disable=SC2016  # the rank's shell expands it
    supervise srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --export=ALL \
        "${site_options[@]}" "${srun_options[@]}" \
        bash -c "$(declare -p CODE_REFUSED CODE_STOPPED && declare -f supervise run_rank)"$'\nrun_rank "$@"' rank "$verdict" \
        "${container[@]}" mae-scale "$@" || code=$?
    case $code,$(cat "$verdict" 2>/dev/null) in
        *,"$CODE_REFUSED")
            say "the command or its recipe was refused: not requeued"
            exit $CODE_REFUSED
            ;;
        0,"$CODE_STOPPED") code=$CODE_STOPPED ;;
        0,*) exit 0 ;;
    esac
    stop_without_progress "$notes" "$out"
    if [ $code = $CODE_STOPPED ]; then
        requeue $code "stopped with a checkpoint at step $(newest_step "$out")"
    fi
    requeue $code "failed with exit code $code, newest checkpoint at step $(newest_step "$out")"
}
