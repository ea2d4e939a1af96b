#!/usr/bin/env bash
# Writes results/stories260k.csv: stories260k tuned on its own samples with 75, 62.5 and 50 % of its
# heads, and with all of them, three seeds each. Some 45 minutes on 2 cores, two runs at a time; the
# same command goes on after a kill.
# usage: results/stories260k.sh MODEL [DIRECTORY], the model as transformers saves it
set -euo pipefail
model=$1 runs=${2:-runs/stories260k}
results=$(cd "$(dirname "$0")" && pwd)
samples=$runs/samples.parquet
export OMP_NUM_THREADS=1 model runs samples

mkdir -p "$runs"
[ -e "$samples" ] ||
    headwise write-text "$model" -o "$samples" --count 10240 --length 200 --batch-size 1024
for budget in 4:6 3:5 2:4; do # shared:active, of 8
    [ -e "$runs/$budget" ] || headwise convert "$model" -o "$runs/$budget" \
        --shared "${budget%:*}" --active "${budget#*:}" --calibrate "$samples" --by loss
done

tune() { # the budget, or "dense"; the seed
    output=$runs/$1-seed$2
    [ ! -e "$output/results.csv" ] || return 0
    if [ "$1" = dense ]; then stage=dense path=$model; else stage=routed path=$runs/$1; fi
    headwise tune "$path" -o "$output" --data "$samples" --seed "$2" \
        $([ ! -e "$output/run.json" ] || echo --resume) \
        --$stage.steps 300 --$stage.learning-rate 2e-3 --$stage.final-learning-rate 2e-5 \
        --sequence-length 200 --batch-size 32 --distill 10 --eval-every 50 --eval-blocks 256
}
export -f tune
for seed in 0 1 2; do
    for budget in dense 4:6 3:5 2:4; do echo "$budget $seed"; done
done | xargs -P 2 -L 1 bash -c 'tune "$@"' tune

awk 'FNR > 1 || NR == 1' "$runs"/{dense,4:6,3:5,2:4}-seed{0,1,2}/results.csv > "$results/stories260k.csv"
