#!/bin/bash
# The comparisons of docs/experiments.md by the fair protocol, one after the other, with their rows put here:
# studies.sh FOLDER [NAME…]. Each takes one to two hours on 2 cores; what was stopped goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1
shift
studies=(moh-budget moh-components combined mhmoe-main mhmoe-layers mhmoe-heads mhmoe-shared-expert mhmoe-bitnet
    moh-shared-share moh-routing moh-heads-of-two-widths domains noise vit-budget dit-budget lm masked dit)
# A tenth faster, and the same numbers: memory is kept from step to step.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1

run() { # command, name, options
    local output=$folder/$2 resume=()
    [ -e "$output/run.json" ] && resume=(--resume)
    .venv/bin/headwise "$1" "$2" --output "$output" "${resume[@]}" "${@:3}"
    cp "$output/results.csv" "results/$2.csv"
    cp "$output/search.csv" "results/$2-search.csv"
    cp "$output/figure.png" "results/$2.png"
    for loads in heads experts; do
        [ ! -e "$output/$loads.csv" ] || cp "$output/$loads.csv" "results/$2-$loads.csv"
    done
}

for name in "${@:-${studies[@]}}"; do
    case $name in
        lm | masked | dit) run train "$name" --protocol fair --seeds 0 1 2 --workers 2 ;;
        multilingual) run train "$name" --protocol fair --seeds 0 1 2 --workers 2 --data "$folder/languages" ;;
        *) run experiment "$name" ;;
    esac
done
