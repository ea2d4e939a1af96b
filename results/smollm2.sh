#!/usr/bin/env bash
# Writes results/smollm2.csv and smollm2-tuning.csv: SmolLM2-135M-Instruct dense, with 7 and with 6
# of its 9 heads, and these two tuned. About an hour on 2 cores; the same command goes on after a
# kill.
# usage: results/smollm2.sh MODEL TEXT DATA…
#   MODEL: as docs/convert.md makes it. TEXT: to calibrate and tune on (here WikiText-2's validation
#   and test text in one file). DATA: directories with the tasks' documents, as headwise eval takes
set -euo pipefail
model=$1 text=$2 runs=${RUNS:-runs/smollm2}
shift 2
results=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$runs"

for budget in 5:7 4:6; do # shared:active, of 9
    heads=${budget#*:}
    [ -e "$runs/moh-$heads" ] || headwise convert "$model" -o "$runs/moh-$heads" \
        --shared "${budget%:*}" --active "$heads" --calibrate "$text"
    tuned=$runs/tuned-$heads
    [ -e "$tuned/results.csv" ] || headwise tune "$runs/moh-$heads" -o "$tuned" --data "$text" \
        $([ ! -e "$tuned/run.json" ] || echo --resume) --precision bf16 --batch-size 4 \
        --routed.steps 100 --routed.warmup-steps 10 --eval-every 20 --eval-blocks 32
done
[ -e "$runs/eval" ] || headwise eval "$model" "$runs"/moh-7 "$runs"/tuned-7/models/routed-seed0 \
    "$runs"/moh-6 "$runs"/tuned-6/models/routed-seed0 --output "$runs/eval" --data "$@" \
    --precision bf16 --limit 200 --batch-size 16 --tasks piqa arc_easy openbookqa winogrande \
    boolq_no_passage blimp_anaphor_number_agreement blimp_determiner_noun_agreement_1 \
    blimp_regular_plural_subject_verb_agreement_1
cp "$runs/eval/eval.csv" "$results/smollm2.csv"
awk 'FNR > 1 || NR == 1' "$runs"/tuned-{7,6}/results.csv > "$results/smollm2-tuning.csv"
