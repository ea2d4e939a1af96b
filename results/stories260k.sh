#!/usr/bin/env bash
# Writes results/stories260k.csv: stories260k tuned on its own samples with every head, and with 6
# and with 4 of its 8 by query norm and by fitted routers, three seeds each, all by the same loss.
# About half an hour on 2 cores, two runs at a time; the same command goes on after a kill.
# usage: results/stories260k.sh MODEL [DIRECTORY], the model as transformers saves it
set -euo pipefail
model=$1 runs=${2:-runs/stories260k}
results=$(cd "$(dirname "$0")" && pwd)
samples=$runs/samples.parquet
export OMP_NUM_THREADS=1 runs samples

mkdir -p "$runs"
[ -e "$samples" ] ||
    headwise write-text "$model" -o "$samples" --count 3584 --length 200 --batch-size 1024

convert() { # name, options
    [ -e "$runs/$1" ] || headwise convert "$model" -o "$runs/$1" "${@:2}"
}
convert every-head --router query_norm --shared 8 --active 8
for heads in 6 4; do
    convert "norm-$heads" --active "$heads" --shared $((heads - 2)) --router query_norm \
        --calibrate "$samples" --by loss
    convert "fitted-$heads" --active "$heads" --calibrate "$samples"
done

tune() { # name, seed
    local output=$runs/$1-seed$2
    [ -e "$output/results.csv" ] || headwise tune "$runs/$1" -o "$output" --data "$samples" \
        --seed "$2" $([ ! -e "$output/run.json" ] || echo --resume) \
        --routed.steps 100 --routed.learning-rate 2e-3 --routed.final-learning-rate 2e-5 \
        --sequence-length 200 --batch-size 32 --distill 10 --eval-every 20 --eval-blocks 256
}
export -f tune
names="every-head fitted-6 norm-6 fitted-4 norm-4"
for seed in 0 1 2; do
    for name in $names; do echo "$name $seed"; done
done | xargs -P 2 -L 1 bash -c 'tune "$@"' tune

for name in $names; do
    awk 'FNR > 1' "$runs/$name"-seed{0,1,2}/results.csv
done | cat <(head -1 "$runs/every-head-seed0/results.csv") - > "$results/stories260k.csv"
