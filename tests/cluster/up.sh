#!/usr/bin/env bash
# up.sh -- bring up a REAL Slurm cluster (munged + slurmctld + N slurmd) on this one host.
# No systemd, no cgroups, no accounting database, loopback only, no tty needed.  Run as root.
# Idempotent: if the cluster in $SLURMCI_STATE already answers, it says so and exits 0.
# Exit codes: 0 up, 77 this machine cannot have one (the last line says why), 1 it should and does not.
# Usage:   SLURMCI_STATE=/tmp/slurm-ci ./up.sh && . /tmp/slurm-ci/env.sh && sinfo
#
# Variables (all optional; not SLURM_*, because srun and sbatch read SLURM_GPUS, SLURM_PARTITION, ...):
#   SLURMCI_STATE       state directory (conf, keys, logs, spool, pids)      [/tmp/slurm-ci]
#   SLURMCI_NODES       number of real compute nodes (one slurmd each)       [2]
#   SLURMCI_CPUS        CPUs each node claims (may exceed the real count)    [8]
#   SLURMCI_MEM_MB      RealMemory each node claims                          [64000]
#   SLURMCI_GPUS        fake GPUs per real node (0 = none)                   [4]
#   SLURMCI_BIG_NODES   extra nodes that exist only on paper (--test-only)   [16]
#   SLURMCI_BIG_GPUS    / SLURMCI_BIG_CPUS / SLURMCI_BIG_MEM_MB for those        [8 / 192 / 2000000]
#   SLURMCI_PARTITION   name of the real default partition                   [debug]
#   SLURMCI_BIG_PARTITION name of the paper partition                        [big]
#   SLURMCI_KILLWAIT    seconds between SIGTERM and SIGKILL at the limit     [10]
#   SLURMCI_SLURMD_TIMEOUT seconds of silence until a node is DOWN           [20]
#   SLURMCI_CRED_EXPIRE seconds before a requeued job may start again        [5]
#   SLURMCI_GRACE       GraceTime of preemption by partition "urgent"        [15]
#   SLURMCI_KEEP        1 = keep jobs and node states of an earlier run      [0]
#   SLURMCI_PORT_BASE   slurmctld port; node i gets base+10+i                [16817]
#   SLURMCI_INSTALL     1 = apt-get install what is missing                  [1]
#
# Each slurmd has its own uts and mount namespace, so that `hostname` is node1 or node2, and "node1" resolves there:
# MASTER_ADDR from `scontrol show hostnames` works as on a real cluster.
set -euo pipefail

STATE=${SLURMCI_STATE:-/tmp/slurm-ci}
NODES=${SLURMCI_NODES:-2};            CPUS=${SLURMCI_CPUS:-8}
MEM=${SLURMCI_MEM_MB:-64000};         GPUS=${SLURMCI_GPUS:-4}
BIGN=${SLURMCI_BIG_NODES:-16};        BIGG=${SLURMCI_BIG_GPUS:-8}
BIGC=${SLURMCI_BIG_CPUS:-192};        BIGM=${SLURMCI_BIG_MEM_MB:-2000000}
PART=${SLURMCI_PARTITION:-debug};     BIGP=${SLURMCI_BIG_PARTITION:-big}
KILLWAIT=${SLURMCI_KILLWAIT:-10};     DTIMEOUT=${SLURMCI_SLURMD_TIMEOUT:-20}
PORT=${SLURMCI_PORT_BASE:-16817};     INSTALL=${SLURMCI_INSTALL:-1}
CLUSTER=ci
CRED=${SLURMCI_CRED_EXPIRE:-5};       KEEP=${SLURMCI_KEEP:-0};              GRACE=${SLURMCI_GRACE:-15}
LOOP=127.0.0.1

die()  { echo "up: ERROR: $*" >&2; exit 1; }
cannot() { echo "up: $*" >&2; exit 77; }
say()  { echo "up: $*"; }
alive() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }   # alive PIDFILE

[ "$(id -u)" = 0 ] || cannot "must run as root (slurmd starts steps as the submitting user)"
unshare --uts --mount true 2>/dev/null || cannot "unshare is not permitted here: nodes cannot have names of their own"
case $STATE in /*) ;; *) die "SLURMCI_STATE must be an absolute path, got '$STATE'";; esac
[ ${#STATE} -le 70 ] || die "SLURMCI_STATE is too long (${#STATE}); unix sockets allow ~108 bytes in all"
export SLURM_CONF=$STATE/slurm.conf
# A Slurm job's or another cluster's variables must not leak into the daemons.
for v in $(compgen -e | grep -E '^(SLURM_(JOB|JOBID|STEP|NODE(ID|LIST)|PROCID|NTASKS|CLUSTER|CONTROL)|SLURMD_|SBATCH_|SRUN_|SALLOC_)' || true); do unset "$v"; done

# 0. already up?
if [ -e "$SLURM_CONF" ] && alive "$STATE/run/slurmctld.pid" && timeout 5 scontrol ping 2>/dev/null | grep -q 'is UP'; then
    ok=1; for i in $(seq 1 "$NODES"); do alive "$STATE/run/slurmd.node$i.pid" || ok=0; done
    [ $ok = 1 ] && { say "already up in $STATE"; sinfo -N -h -o '%N %T' -p "$PART" || true; exit 0; }
    say "slurmctld is up, some slurmd is not: starting what is missing"
fi

# 1. packages
need=0; for c in munged slurmctld slurmd sbatch srun; do command -v $c >/dev/null || need=1; done
if [ $need = 1 ]; then
    [ "$INSTALL" = 1 ] || cannot "slurm/munge are not installed and SLURMCI_INSTALL=0"
    command -v apt-get >/dev/null || cannot "no apt-get: install munge, slurmctld, slurmd, slurm-client by hand"
    mkdir -p "$STATE"
    # Keep the packages' postinst from starting daemons with the (absent) system config.
    prc=/usr/sbin/policy-rc.d; made=0
    [ -e $prc ] || { printf '#!/bin/sh\nexit 101\n' >$prc; chmod 755 $prc; made=1; }
    say "installing slurm and munge with apt"
    apt-cache show slurmctld >/dev/null 2>&1 || apt-get update -qq </dev/null || true
    rc=0; DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        munge slurmctld slurmd slurm-client </dev/null >"$STATE/apt.log" 2>&1 || rc=$?
    [ $made = 1 ] && rm -f $prc
    [ $rc = 0 ] || cannot "Slurm cannot be installed with apt-get: $(tail -n 1 "$STATE/apt.log")"
fi
getent passwd munge >/dev/null || die "user 'munge' is missing"

# 2. directories
mkdir -p "$STATE"/{run,log,spool/ctld,munge,dev}
chmod 755 "$STATE" "$STATE"/{run,log,spool,dev}
for i in $(seq 1 "$NODES"); do mkdir -p "$STATE/spool/node$i"; done
# every parent of the munge socket must be traversable by all and not group/other-writable (unless sticky)
p=$STATE; while [ "$p" != / ]; do
    m=$(stat -c %a "$p"); o=$(( 8#${m: -1} )); g=$(( 8#${m: -2:1} ))
    st=0; [ ${#m} -ge 4 ] && st=$(( 8#${m:0:1} & 1 ))
    (( o & 1 )) || die "$p (mode $m) is not traversable by user munge: pick another SLURMCI_STATE"
    (( ((o|g) & 2) && !st )) && die "$p (mode $m) is group/world-writable without sticky bit: munged refuses it"
    p=$(dirname "$p"); done

# 3. munge: our own key, socket and pid
# munged insists: key 0600/0400 and owned by the uid it runs as; log dir 0700; socket dir traversable.
if ! alive "$STATE/run/munged.pid"; then
    chown munge: "$STATE/munge"; chmod 711 "$STATE/munge"
    mkdir -p "$STATE/munge/log"
    [ -s "$STATE/munge/key" ] || { rm -f "$STATE/munge/key"; (umask 077; head -c 128 /dev/urandom >"$STATE/munge/key"); }
    chmod 600 "$STATE/munge/key"; chmod 700 "$STATE/munge/log"
    chown munge: "$STATE/munge/key" "$STATE/munge/log"
    rm -f "$STATE/munge/munged.pid"
    setpriv --reuid=munge --regid="$(id -g munge)" --clear-groups -- munged --force \
        --key-file="$STATE/munge/key" --socket="$STATE/munge/sock" --pid-file="$STATE/munge/munged.pid" \
        --log-file="$STATE/munge/log/munged.log" --seed-file="$STATE/munge/seed" </dev/null \
        >"$STATE/log/munged.start" 2>&1 \
        || die "munged did not start: $(tail -3 "$STATE/log/munged.start") $(tail -3 "$STATE/munge/log/munged.log" 2>/dev/null)"
    for _ in $(seq 50); do [ -s "$STATE/munge/munged.pid" ] && [ -S "$STATE/munge/sock" ] && break; sleep 0.1; done
    cp "$STATE/munge/munged.pid" "$STATE/run/munged.pid" 2>/dev/null || die "munged left no pid file, see $STATE/munge/log/munged.log"
fi
munge -n -S "$STATE/munge/sock" | unmunge -S "$STATE/munge/sock" >"$STATE/log/munge.check" 2>&1 \
    || die "munge does not round-trip: $(head -1 "$STATE/log/munge.check")"

# 4. configuration
HOST=$(hostname -s)
# All nodes share 127.0.0.1 and differ by port.  (An own 127.0.x.y per node does not work: slurmd answers srun
# at the SOURCE address of its request, which the kernel makes 127.0.0.1, where srun does not listen.)
{ echo "$LOOP localhost $HOST"; for i in $(seq 1 "$NODES"); do echo "$LOOP node$i"; done; } >"$STATE/hosts"
gres_real=; gres_big=; grestypes=; : >"$STATE/gres.conf"
if [ "$GPUS" -gt 0 ]; then
    grestypes="GresTypes=gpu"; gres_real="Gres=gpu:$GPUS"
    # File= must be a character or block device (slurmd stats it, nothing opens it): a symlink to /dev/null
    # will do.  Having File= is what makes Slurm export CUDA_VISIBLE_DEVICES (Count= alone does not).
    for g in $(seq 0 $((GPUS-1))); do ln -sfn /dev/null "$STATE/dev/nvidia$g"; done
    for i in $(seq 1 "$NODES"); do
        rng=$([ "$GPUS" = 1 ] && echo 0 || echo "[0-$((GPUS-1))]")
        if [ "${SLURMCI_GRES_COUNT_ONLY:-0}" = 1 ]; then echo "NodeName=node$i Name=gpu Count=$GPUS" >>"$STATE/gres.conf"
        else echo "NodeName=node$i Name=gpu File=$STATE/dev/nvidia$rng" >>"$STATE/gres.conf"; fi; done
fi
if [ "$BIGN" -gt 0 ] && [ "$BIGG" -gt 0 ]; then grestypes="GresTypes=gpu"; gres_big="Gres=gpu:$BIGG"; fi
cat >"$STATE/cgroup.conf" <<C
CgroupPlugin=cgroup/v1
CgroupAutomount=no
C
: >"$STATE/plugstack.conf"
{
cat <<C
# generated by up.sh
ClusterName=$CLUSTER
SlurmctldHost=$HOST($LOOP)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire (default 120 s) is also how long a requeued job must wait before it may start again
AuthInfo=socket=$STATE/munge/sock,cred_expire=$CRED
# show the powered-down paper nodes in sinfo
PrivateData=cloud
CredType=cred/munge
SlurmctldPort=$PORT
# bind to the address the host name resolves to, never to 0.0.0.0
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$STATE/spool/ctld
SlurmdSpoolDir=$STATE/spool/%n
SlurmctldPidFile=$STATE/run/slurmctld.pid
SlurmdPidFile=$STATE/run/slurmd.%n.pid
SlurmctldLogFile=$STATE/log/slurmctld.log
SlurmdLogFile=$STATE/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
PlugStackConfig=$STATE/plugstack.conf
# no cgroups, no binding: two cores may be sold many times over
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
# no database: job history is a flat text file
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$STATE/log/jobcomp.log
# fast enough for CI
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=2
SlurmctldTimeout=10
SlurmdTimeout=$DTIMEOUT
KillWait=$KILLWAIT
MinJobAge=3600
InactiveLimit=0
JobRequeue=1
ReturnToService=2
$grestypes
C
for i in $(seq 1 "$NODES"); do
    echo "NodeName=node$i NodeHostname=node$i NodeAddr=$LOOP Port=$((PORT+10+i)) CPUs=$CPUS Boards=1 SocketsPerBoard=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=$MEM $gres_real State=UNKNOWN"
done
# Jobs in the default partition can be preempted (requeued) by jobs in partition "urgent": first the signal
# the job asked for with --signal (without one, TERM to the steps), the requeue GraceTime (to +30 s) later.
echo "PreemptType=preempt/partition_prio"; echo "PreemptMode=REQUEUE"; echo "SlurmctldParameters=preempt_send_user_signal"
echo "PartitionName=$PART Nodes=node[1-$NODES] Default=YES MaxTime=INFINITE DefaultTime=10 State=UP OverSubscribe=NO PriorityTier=1 PreemptMode=REQUEUE GraceTime=$GRACE"
echo "PartitionName=urgent Nodes=node[1-$NODES] Default=NO MaxTime=INFINITE DefaultTime=10 State=UP OverSubscribe=NO PriorityTier=100 PreemptMode=OFF"
if [ "$BIGN" -gt 0 ]; then
    # Paper nodes: CLOUD nodes that are "powered down" need no slurmd.  Power saving must be configured or
    # slurmctld takes them for up and pings them for ever.
    echo "SuspendProgram=/bin/true"; echo "ResumeProgram=/bin/true"
    echo "SuspendTime=100000000";    echo "SuspendExcNodes=node[1-$NODES]"
    echo "NodeName=big[1-$BIGN] CPUs=$BIGC Boards=1 SocketsPerBoard=2 CoresPerSocket=$((BIGC/2)) ThreadsPerCore=1 RealMemory=$BIGM $gres_big NodeAddr=$LOOP Port=$((PORT+9)) State=${SLURMCI_BIG_STATE:-CLOUD}"
    echo "PartitionName=$BIGP Nodes=big[1-$BIGN] Default=NO MaxTime=INFINITE State=${SLURMCI_BIG_PSTATE:-UP}"
fi
} >"$SLURM_CONF.new"
mv "$SLURM_CONF.new" "$SLURM_CONF"
cat >"$STATE/env.sh" <<C
export SLURM_CONF=$STATE/slurm.conf SLURMCI_STATE=$STATE
C

# 5. daemons
if ! alive "$STATE/run/slurmctld.pid"; then
    rm -f "$STATE/run/slurmctld.pid"
    # setsid + closed stdin: no tty, and not in the caller's process group (CI kills that)
    # -c: forget earlier jobs and node states.  Stale states are harmful: paper nodes recovered as "up" make
    # slurmctld ping and resolve them for ever, and every client call then times out.
    clear=-c; [ "$KEEP" = 1 ] && clear=
    setsid slurmctld $clear -f "$SLURM_CONF" </dev/null >"$STATE/log/slurmctld.start" 2>&1 \
        || die "slurmctld did not start: $(tail -5 "$STATE/log/slurmctld.start") $(grep -E 'fatal|error' "$STATE/log/slurmctld.log" 2>/dev/null | tail -3)"
fi
for _ in $(seq 100); do timeout 5 scontrol ping 2>/dev/null | grep -q 'is UP' && break; sleep 0.1; done
timeout 5 scontrol ping 2>/dev/null | grep -q 'is UP' || die "slurmctld does not answer: $(tail -5 "$STATE/log/slurmctld.log")"
for i in $(seq 1 "$NODES"); do
    alive "$STATE/run/slurmd.node$i.pid" && continue
    rm -f "$STATE/run/slurmd.node$i.pid"
    # shellcheck disable=SC2016  # the inner shell expands it
    setsid unshare --uts --mount sh -ec 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"' sh \
        "node$i" "$STATE/hosts" slurmd -N "node$i" -f "$SLURM_CONF" </dev/null >"$STATE/log/slurmd.node$i.start" 2>&1 \
        || die "slurmd node$i did not start: $(tail -5 "$STATE/log/slurmd.node$i.start") $(grep -E 'fatal|error' "$STATE/log/slurmd.node$i.log" 2>/dev/null | tail -3)"
done

# 6. wait for idle
good=0
for _ in $(seq 150); do
    good=$(sinfo -h -N -p "$PART" -o '%N %T' 2>/dev/null | grep -cE ' (idle|mixed|allocated)$' || true)
    [ "$good" = "$NODES" ] && break
    sleep 0.2
done
sinfo -o '%P %a %D %T %N %c %m %G'
[ "$good" = "$NODES" ] || die "only $good of $NODES nodes came up: $(sinfo -R -h); logs in $STATE/log"
say "up: $NODES nodes in $STATE  (use: . $STATE/env.sh)"
