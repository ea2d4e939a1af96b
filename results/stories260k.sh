#!/usr/bin/env bash
# Writes results/stories260k.csv: stories260k tuned on its own samples with every head, and with 6
# and with 4 of its 8 by query norm and by fitted routers, three seeds each, all by the same loss.
# About half an hour on 2 cores, two runs at a time; the same command goes on after a kill.
# usage: results/stories260k.sh MODEL [DIRECTORY], the model as transformers saves it
set -euo pipefail
model=$1 runs=${2:-runs/stories260k}
results=$(cd "$(dirname "$0")" && pwd)
samples=$runs/samples.parquet
export OMP_NUM_THREADS=1 samples
. "$results/seeds.sh"

mkdir -p "$runs"
[ -e "$samples" ] ||
    headwise write-text "$model" -o "$samples" --count 3584 --length 200 --batch-size 1024

convert "$model" every-head --router query_norm --shared 8 --active 8
for heads in 6 4; do
    convert "$model" "norm-$heads" --active "$heads" --shared $((heads - 2)) --router query_norm \
        --calibrate "$samples" --by loss
    convert "$model" "fitted-$heads" --active "$heads" --calibrate "$samples"
done

tune() { # name, seed
    local output=$runs/$1-seed$2
    [ -e "$output/results.csv" ] || headwise tune "$runs/$1" -o "$output" --data "$samples" \
        --seed "$2" $([ ! -e "$output/run.json" ] || echo --resume) \
        --routed.steps 100 --routed.learning-rate 2e-3 --routed.final-learning-rate 2e-5 \
        --sequence-length 200 --batch-size 32 --distill 10 --eval-every 20 --eval-blocks 256
}
tune_three_seeds "$results/stories260k.csv" every-head fitted-6 norm-6 fitted-4 norm-4
