# What smollm2.sh and stories260k.sh share: models that are converted once and tuned with three
# seeds, two runs at a time. They set $runs and a function tune, of a name and a seed.

convert() { # model, name, options
    [ -e "$runs/$2" ] || headwise convert "$1" -o "$runs/$2" "${@:3}"
}

tune_three_seeds() { # output, names: the rows of all of them, one model after the other
    local output=$1 name seed
    shift
    export runs
    export -f tune
    for seed in 0 1 2; do
        for name; do echo "$name $seed"; done
    done | xargs -P 2 -L 1 bash -c 'tune "$@"' tune
    for name; do
        awk 'FNR > 1' "$runs/$name"-seed{0,1,2}/results.csv
    done | cat <(head -1 "$runs/$1-seed0/results.csv") - > "$output"
}
