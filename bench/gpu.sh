#!/usr/bin/env bash
# Everything worth knowing from a few minutes with a GPU, in four stages of less than 9.5 minutes each.
#   bench/gpu.sh STAGE [CARRIED]    STAGE: truth, speed, profile or data; CARRIED: a folder of pieces (default .gpu)
#   OUT=DIR (bench/results/gpu-run)   logs and figures    PYTHON=python3    TMPDIR: where the pieces are unpacked
# Needs torch, timm, transformers, scikit-learn, pytest, and no network. What else is missing may lie in CARRIED:
# core.tar.xz (DeepSpeed, FairScale, pydantic), dali.tar.xz.00, .01 ... (DALI; they may come with several calls),
# cifar10.tar.xz (train/CLASS/*.jpg, val/CLASS/*.jpg). Each part has a time limit of its own; after a failure the next
# one runs. STAGE.log has all output, STAGE.json what ran, failed or was skipped and why. Exit code 1 when a part failed.
# Without a GPU each part runs its smallest size or says "no GPU".
set -uo pipefail
stage=${1:-}
case $stage in truth | speed | profile | data) ;; *)
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root" || exit 1
carried=${2:-${CARRIED:-.gpu}}
out=${OUT:-bench/results/gpu-run}
python=${PYTHON:-python3}
site=${TMPDIR:-/tmp}/mae-scale-site
mkdir -p "$out" "$site/pieces"
out=$(cd "$out" && pwd)
export PYTHONPATH=$root:$site${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1
log=$out/$stage.log parts=$out/.$stage.parts
: >"$log"
: >"$parts"
total_s=560

say() { echo "$*" | tee -a "$log"; }

# Unpacks what is carried, once. The pieces of DALI are all there when the last one is smaller than the first.
unpack() {
    if [ -f "$carried/core.tar.xz" ] && [ ! -e "$site/pieces/core" ]; then
        if tar xJf "$carried/core.tar.xz" -C "$site"; then touch "$site/pieces/core"; else say "core.tar.xz is damaged"; fi
    fi
    [ -e "$site/pieces/dali" ] && return
    cp -n "$carried"/dali.tar.xz.* "$site/pieces/" 2>/dev/null
    local found=("$site"/pieces/dali.tar.xz.*)
    [ -e "${found[0]}" ] || return
    local n=${#found[@]} last
    last=$(printf '%s/pieces/dali.tar.xz.%02d' "$site" $((n - 1)))
    if [ -f "$last" ] && [ "$(stat -c %s "$last")" -lt "$(stat -c %s "${found[0]}")" ] &&
        cat "${found[@]}" | tar xJ -C "$site"; then
        # One package "nvidia" of the carried folder and of the machine's own.
        echo '__path__ = __import__("pkgutil").extend_path(__path__, __name__)' >"$site/nvidia/__init__.py"
        touch "$site/pieces/dali"
    else
        say "DALI: $n piece(s) so far, not all"
    fi
}

note() { printf '%s\t%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" "$5" >>"$parts"; }

# part NAME LIMIT_S "MODULES" COMMAND...: runs it when its modules are there and time is left.
part() {
    local name=$1 limit=$2 missing="" module
    for module in $3; do [[ " $absent " == *" $module "* ]] && missing+=" $module"; done
    shift 3
    if [ -n "$missing" ]; then
        skip "$name" "missing:$missing"
        return
    fi
    local left=$((total_s - SECONDS))
    if [ "$left" -lt 10 ]; then
        skip "$name" "no time left"
        return
    fi
    [ "$limit" -gt "$left" ] && limit=$left
    say "=== $stage: $name (at most $limit s): $*"
    local began=$SECONDS state code
    timeout -k 10 "$limit" "$@" 2>&1 | tee -a "$log"
    code=${PIPESTATUS[0]}
    case $code in
    0) state="done" ;;
    124 | 137) state="failed: over its limit of $limit s" ;;
    *) state="failed: exit code $code" ;;
    esac
    say "=== $stage: $name: $state"
    note "$name" "${state%%:*}" "${state#*: }" $((SECONDS - began)) "$*"
}

skip() {
    say "=== $stage: $1: skipped: $2"
    note "$1" skipped "$2" 0 ""
}

# part, but skipped without a GPU.
gpu_part() { if [ "$gpu" = 1 ]; then part "$@"; else skip "$1" "no GPU"; fi; }

tests() { gpu_part "$1" "$2" "$3" "$python" -m pytest -p no:cacheprovider -o addopts= -q -ra "$4"; }

truth() {
    gpu_part "nvidia-smi" 20 "" nvidia-smi
    part "rates of the machine" 60 "" "$python" bench/rates.py --json "$out/rates.json"
    gpu_part "rates of planning" 60 "typer" "$python" -m mae_scale plan --measure "$out/planned-rates.json"
    part "attention" 100 "" "$python" bench/attention.py "${attention[@]}" --json "$out/attention.json"
    part "throughput timer" 120 "deepspeed pydantic" "$python" bench/engine.py "${timer[@]}" --ways engine \
        --zero-stages 1 --throughput-timer --json "$out/timer.json"
    tests "tests of a step" 120 "" tests/gpu/test_step.py
    tests "tests of planning" 120 "deepspeed pydantic" tests/gpu/test_planned.py
    tests "tests of the methods" 200 "deepspeed pydantic" tests/gpu/test_methods.py
    tests "tests of the engines" 400 "deepspeed pydantic fairscale" tests/gpu/test_engines.py
}

speed() {
    part "huge" 300 "deepspeed pydantic" "$python" bench/engine.py "${huge[@]}" --stop-after-s 270 --json "$out/engine-huge.json"
    part "large" 180 "deepspeed pydantic" "$python" bench/engine.py "${large[@]}" --stop-after-s 150 --json "$out/engine-large.json"
    part "mask tokens" 150 "deepspeed pydantic" "$python" bench/mask_tokens.py "${mask_tokens[@]}" --json "$out/mask_tokens.json"
}

profile() {
    part "three steps" 180 "deepspeed pydantic" "$python" bench/profile_step.py "${profiled[@]}" --json "$out/profile_step.json"
    part "stall of a save" 240 "deepspeed pydantic" "$python" bench/checkpoint_stall.py "${saved[@]}" --out "$out/checkpoint_stall.json"
    part "methods" 150 "deepspeed pydantic" "$python" bench/methods.py "${methods[@]}" --json "$out/methods.json"
}

data() {
    part "decoding" 180 "deepspeed pydantic nvidia.dali six sklearn" "$python" bench/decoding.py "${decoding[@]}" --json "$out/decoding.json"
    tests "tests of decoding" 100 "nvidia.dali six sklearn" tests/gpu/test_decoding.py
    if [ -f "$carried/cifar10.tar.xz" ]; then cifar10; else skip "CIFAR-10" "no cifar10.tar.xz in $carried"; fi
    tests "tests of pre-training" 300 "nvidia.dali six sklearn deepspeed pydantic typer matplotlib" tests/gpu/test_pretrain.py
}

# A real run from JPEGs, stopped and gone on with by the same command; and a whole one that decodes on the CPU.
cifar10() {
    local images=${TMPDIR:-/tmp}/mae-scale-cifar10 run
    run=$(mktemp -d)
    [ -d "$images/train" ] || { mkdir -p "$images" && tar xJf "$carried/cifar10.tar.xz" -C "$images"; }
    local train=("$python" -m mae_scale pretrain demo "data.root=$images/train" "data.val_root=$images/val" tracking.uri=off
        tracking.log_every_steps=1 schedule.epochs=2 schedule.warmup_epochs=1 checkpoint.every_epochs=null "${cifar[@]}")
    local needs="nvidia.dali six deepspeed pydantic typer"
    part "CIFAR-10, the first half" 80 "$needs" "${train[@]}" --out "$run/a" "schedule.stop_after_steps=$half"
    part "CIFAR-10, gone on with" 80 "$needs" "${train[@]}" --out "$run/a" "schedule.stop_after_steps=$((2 * half))"
    part "CIFAR-10, decoded on the CPU" 80 "$needs" "${train[@]}" --out "$run/b" "schedule.stop_after_steps=$((2 * half))" data.device=cpu
    for name in a b; do
        [ -f "$run/$name/metrics.jsonl" ] && cp "$run/$name/metrics.jsonl" "$out/cifar10-$name.jsonl" && tail -n 1 "$run/$name/metrics.jsonl"
    done
    rm -rf "$run"
}

say "$stage: figures and logs in $out"
unpack
wanted="torch timm transformers deepspeed fairscale pydantic yaml safetensors typer rich matplotlib sklearn pytest nvidia.dali six"
# shellcheck disable=SC2086
absent=$("$python" - $wanted <<'END'
import importlib.util, sys
def there(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False
print(*(module for module in sys.argv[1:] if not there(module)))
END
)
say "modules that are missing: ${absent:-none}"
gpu=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))' 2>/dev/null) || gpu=0
if [ "$gpu" = 1 ]; then
    attention=() timer=(--sizes huge --micro-batches 32 --rounds 2) profiled=() decoding=()
    huge=(--sizes huge --micro-batches 256 32 128 64 --zero-stages 2 1 --rounds 1) large=(--sizes large --micro-batches 512 128 256 --zero-stages 2 1 --rounds 1)
    mask_tokens=() saved=(--width 1024 --depth 24 --saves 1) methods=(--rounds 2) cifar=(data.global_batch=512 data.threads=8) half=60
else
    say "no GPU: the smallest sizes"
    attention=(--shapes tiny) timer=(--sizes tiny --rounds 1) profiled=(--size tiny) decoding=(--size tiny --images 32 --threads 1)
    huge=(--sizes tiny --rounds 1 --zero-stages 1) large=(--sizes tiny --rounds 1 --zero-stages 2 --ways engine)
    mask_tokens=(--sizes tiny --rounds 1) saved=(--width 64 --depth 2 --saves 1) methods=(--size tiny --rounds 1) cifar=() half=3
fi

"$stage"

"$python" - "$stage" "$parts" "$out/$stage.json" "$gpu" <<'END'
import json, sys
stage, parts, path, gpu = sys.argv[1:]
rows = [line.rstrip("\n").split("\t") for line in open(parts)]
keys = ("part", "state", "reason", "seconds", "command")
found = [dict(zip(keys, row)) | {"seconds": int(row[3])} for row in rows]
json.dump({"stage": stage, "gpu": gpu == "1", "parts": found}, open(path, "w"), indent=1)
END
say "=== $stage in $SECONDS s"
while IFS=$'\t' read -r name state reason took _; do
    if [ "$state" = "done" ]; then say "  done     $name ($took s)"; else say "  $state $name: $reason"; fi
done <"$parts"
failed=$(cut -f 2 "$parts" | grep -c failed)
rm -f "$parts"
[ "$failed" = 0 ]
