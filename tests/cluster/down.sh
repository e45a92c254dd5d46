#!/usr/bin/env bash
# down.sh -- stop the cluster that up.sh started in $SLURMCI_STATE, by pid only.
# Idempotent.  SLURMCI_PURGE=1 also deletes the state directory.
set -uo pipefail
STATE=${SLURMCI_STATE:-/tmp/slurm-ci}
export SLURM_CONF=$STATE/slurm.conf
say() { echo "down: $*"; }
[ -d "$STATE/run" ] || { say "nothing in $STATE"; exit 0; }

# pid of PIDFILE if it is alive AND is the program we think it is (pids get re-used)
pid_of() { local p; [ -s "$1" ] || return 1; p=$(cat "$1"); kill -0 "$p" 2>/dev/null || return 1
           case $(readlink "/proc/$p/exe") in */"$2"*) echo "$p";; *) return 1;; esac; }
stop() { # stop PIDFILE PROGRAM SECONDS
    local p; p=$(pid_of "$1" "$2") || { rm -f "$1"; return 0; }
    kill -TERM "$p" 2>/dev/null
    for _ in $(seq $(( $3 * 10 ))); do kill -0 "$p" 2>/dev/null || { rm -f "$1"; return 0; }; sleep 0.1; done
    say "$2 ($p) ignored SIGTERM, SIGKILL"; kill -KILL "$p" 2>/dev/null; rm -f "$1"; }
# slurmstepd and tasks of this cluster: they carry our SLURM_CONF in the environment, and slurmstepd
# or one of its sons is what we may end.  The caller (and its ancestors) may carry it too: spare those.
ours() { local e p anc=" " q=$$
    while [ "${q:-0}" -gt 1 ]; do anc+="$q "; q=$(awk '/^PPid/{print $2}' "/proc/$q/status" 2>/dev/null); done
    # shellcheck disable=SC2013  # /proc's names have no spaces
    for e in $(grep -lzx "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ 2>/dev/null); do p=${e#/proc/}; p=${p%/environ}
        case $anc in *" $p "*) continue;; esac
        case $(readlink "/proc/$p/exe" 2>/dev/null) in */slurmstepd*) echo "$p"; continue;; esac
        grep -qz '^SLURM_JOB_ID=' "$e" 2>/dev/null && echo "$p"
    done; }

if pid_of "$STATE/run/slurmctld.pid" slurmctld >/dev/null; then
    jobs=$(timeout 5 squeue -h -o %A 2>/dev/null | sort -u | tr '\n' ' ')
    if [ -n "${jobs// /}" ]; then
        # shellcheck disable=SC2086  # several ids
        { timeout 10 scancel -s KILL -f $jobs; timeout 10 scancel $jobs; } 2>/dev/null
        for _ in $(seq 50); do [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break; sleep 0.2; done
    fi
fi
# TERM to all slurmd at once (each needs about 2 s to go), then collect
for f in "$STATE"/run/slurmd.*.pid; do p=$(pid_of "$f" slurmd) && kill -TERM "$p" 2>/dev/null; done
for f in "$STATE"/run/slurmd.*.pid; do [ -e "$f" ] && stop "$f" slurmd 5; done
p=$(pid_of "$STATE/run/slurmctld.pid" slurmctld) && kill -TERM "$p" 2>/dev/null
left=$(ours); for p in $left; do kill -TERM "$p" 2>/dev/null; done
[ -n "$left" ] && { sleep 1; for p in $left; do kill -KILL "$p" 2>/dev/null; done; }
stop "$STATE/run/slurmctld.pid" slurmctld 10
stop "$STATE/run/munged.pid" munged 5
rc=0; [ -n "$(ours)" ] && { say "still alive: $(ours | tr '\n' ' ')"; rc=1; }
[ "${SLURMCI_PURGE:-0}" = 1 ] && [ $rc = 0 ] && rm -rf "$STATE"
[ $rc = 0 ] && say "down ($STATE)"
exit $rc
