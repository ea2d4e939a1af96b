#!/usr/bin/env bash
# Writes results/smollm2-tuning.csv: SmolLM2-135M-Instruct with every head, and with 7 of 9 by query
# norm and by fitted routers, tuned on the same tokens by the same loss; and results/smollm2.csv,
# what they score. Learning rates are tried with the first seed, the best one has three. Some three
# hours on 2 cores; the same command goes on after a kill.
# usage: results/smollm2.sh MODEL VALID TEST DATA…
#   MODEL: as docs/convert.md makes it. VALID: text to fit to and to tune on (here WikiText-2's
#   validation text). TEST: text to measure perplexity on (WikiText-2's test text). DATA:
#   directories with the tasks' documents, as headwise eval takes them
set -euo pipefail
model=$1 valid=$2 test=$3 runs=${RUNS:-runs/smollm2}
shift 3
results=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$runs"

convert() { # name, options
    [ -e "$runs/$1" ] || headwise convert "$model" -o "$runs/$1" "${@:2}"
}
convert every-head --router query_norm --shared 9 --active 9
convert norm-7 --router query_norm --shared 5 --active 7 --calibrate "$valid"
convert fitted-7 --active 7 --calibrate "$valid"

tune() { # name, learning rate, seed
    local output=$runs/$1-$2-seed$3
    [ -e "$output/results.csv" ] || headwise tune "$runs/$1" -o "$output" --seed "$3" \
        --data "$valid" --eval-data "$test" $([ ! -e "$output/run.json" ] || echo --resume) \
        --precision bf16 --distill 0 --routed.steps 130 --routed.warmup-steps 10 \
        --routed.learning-rate "$2" --routed.final-learning-rate "$(awk "BEGIN { print $2 / 10 }")" \
        --eval-every 26 --eval-blocks 32
}
best() { # name: the learning rate of least perplexity
    for rate in $rates; do
        awk -F, -v rate="$rate" 'NR == 1 { for (i = 1; i <= NF; i++) if ($i == "perplexity") p = i }
            END { print $p, rate }' "$runs/$1-$rate-seed0/results.csv"
    done | sort -g | awk 'NR == 1 { print $2 }'
}

names="every-head fitted-7 norm-7" rates="1e-4 3e-5 3e-4"
for name in $names; do
    for rate in $rates; do tune "$name" "$rate" 0; done
done
for seed in 1 2; do
    for name in $names; do tune "$name" "$(best "$name")" "$seed"; done
done
for name in $names; do
    for file in "$runs/$name"-*-seed*/results.csv; do
        rate=${file#"$runs/$name-"}
        awk -v rate="${rate%-seed*}" '{ print (FNR == 1 ? "learning_rate" : rate) "," $0 }' "$file"
    done
done | awk 'NR == 1 || !/^learning_rate/' > "$results/smollm2-tuning.csv"

last() { # name: the model as it was tuned with the first seed
    echo "$runs/$1-$(best "$1")-seed0/models/routed-seed0"
}
[ -e "$runs/eval" ] || headwise eval "$model" "$runs"/fitted-7 "$runs"/norm-7 "$(last every-head)" \
    "$(last fitted-7)" "$(last norm-7)" --output "$runs/eval" --data "$@" \
    --precision bf16 --limit 500 --batch-size 16 --tasks piqa arc_easy openbookqa winogrande \
    boolq_no_passage blimp_anaphor_number_agreement blimp_determiner_noun_agreement_1 \
    blimp_regular_plural_subject_verb_agreement_1
cp "$runs/eval/eval.csv" "$results/smollm2.csv"
