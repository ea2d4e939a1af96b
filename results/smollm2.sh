#!/usr/bin/env bash
# Writes results/smollm2-tuning.csv: SmolLM2-135M-Instruct with every head, and with 7 of 9 by fitted
# routers, tuned as docs/convert.md does, on the same tokens by the same loss, three seeds each; and
# results/smollm2.csv, what they score. Two and a half hours on 2 cores in float32, two runs at a
# time; the same command goes on after a kill.
# usage: results/smollm2.sh MODEL VALID TEST DATA…
#   MODEL: as docs/convert.md makes it. VALID: text to fit to and to tune on (here WikiText-2's
#   validation text). TEST: text to measure perplexity on (WikiText-2's test text). DATA:
#   directories with the tasks' documents, as headwise eval takes them
set -euo pipefail
model=$1 runs=${RUNS:-runs/smollm2}
export valid=$2 test=$3
shift 3
results=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$runs"

. "$results/seeds.sh"

convert "$model" every-head --router query_norm --shared 9 --active 9
convert "$model" fitted-7 --active 7 --calibrate "$valid"

export OMP_NUM_THREADS=1 # of each of two processes
tune() { # name, seed
    local output=$runs/$1-seed$2
    [ -e "$output/results.csv" ] || headwise tune "$runs/$1" -o "$output" --seed "$2" \
        --data "$valid" --eval-data "$test" $([ ! -e "$output/run.json" ] || echo --resume) \
        --routed.steps 100 --batch-size 2 --eval-every 50
}
tune_three_seeds "$results/smollm2-tuning.csv" every-head fitted-7

tuned() { echo "$runs/$1-seed0/models/routed-seed0"; } # name: the first seed's model
export OMP_NUM_THREADS=2
[ -e "$runs/eval" ] || headwise eval "$model" "$runs/fitted-7" "$(tuned every-head)" \
    "$(tuned fitted-7)" --output "$runs/eval" --data "$@" --limit 500 --batch-size 16 \
    --tasks piqa arc_easy openbookqa winogrande boolq_no_passage blimp_anaphor_number_agreement \
    blimp_determiner_noun_agreement_1 blimp_regular_plural_subject_verb_agreement_1
cp "$runs/eval/eval.csv" "$results/smollm2.csv"
