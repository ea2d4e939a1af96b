#!/usr/bin/env bash
# What there is to measure on a machine with an NVIDIA GPU, most important first: a quarter of an hour.
#
#     benchmarks/gpu.sh OUTPUT [STEP ...]
#
# Every step has a time limit, writes under OUTPUT as it goes, and the next one runs whatever became
# of it. A machine that cannot install anything needs, as wheels beside torch, transformers and
# accelerate: tyro docstring_parser typeguard datasets dill multiprocess beartype einops jaxtyping
# wadler_lindig rich matplotlib pytest pytest-xdist hypothesis.
set -uo pipefail
cd "$(dirname "$0")/.."
output=${1:?usage: benchmarks/gpu.sh OUTPUT [STEP ...]}
shift
steps=("$@")
mkdir -p "$output"
export PYTHONPATH="$PWD/src:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 XDG_CACHE_HOME="${XDG_CACHE_HOME:-$output/cache}"

# step NAME SECONDS COMMAND: runs if it was asked for, or if nothing was.
step() {
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    [[ ${#steps[@]} -eq 0 || " ${steps[*]} " == *" $name "* ]] || return 0
    printf '\n=== %s, at most %s s\n' "$name" "$limit"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$output/$name.log"
    printf '=== %s: status %s after %s s\n' "$name" "${PIPESTATUS[0]}" $((SECONDS - started))
}

step card 20 nvidia-smi
step env 60 python3 -m headwise env
step smoke 120 python3 benchmarks/gpu/smoke.py
step tests 180 python3 -m pytest -q -x -n 8 -p no:cacheprovider -p no:benchmark \
    tests/ops/test_*_triton.py tests/ops/test_on_gpu.py
step tiles 150 python3 benchmarks/gpu/tiles.py "$output/tiles.csv"
for which in attention decode experts layer model; do
    step "$which" 200 python3 -m headwise bench "$which" --device cuda --output "$output/$which"
done
step scaling 200 python3 -m headwise bench scaling --quick --device cuda --output "$output/scaling"
step models 300 python3 benchmarks/gpu/models.py "$output/models.csv"
step train 180 python3 -m headwise train lm --models dense moh --sequence-length 4096 \
    --dim 512 --mlp-dim 1376 --num-heads 8 --num-layers 8 --steps 60 --warmup-steps 10 \
    --batch-size 8 --precision bf16 --eval-every 60 --save-every 60 --output "$output/train"
printf '\n=== all steps done\n'
