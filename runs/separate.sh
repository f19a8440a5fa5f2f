#!/usr/bin/env bash
# What the memory layer is worth by itself, and what its memory: a plain layer in its place, next to no memory (32
# entries), and 65,536, at two learning rates; then another seed, and 8,192 entries. Plain layers take products there;
# then with queries and keys normalised in them too, as the preset has it since.
source "$(dirname "$0")/common.sh"
data=$(c_sources)

compare() { # SEED MEMORY...
    local seed=$1 memory rate
    shift
    for rate in 1e-3 5e-4; do
        for memory in "$@"; do
            figure "separate-$memory-$rate-seed-$seed" \
                --preset code --data "$data" --memory "$memory" --plain-similarity product \
                --learning-rate "$rate" --seed "$seed" --eval-every 0
        done
    done
}

compare 0 0 32 65536
compare 1 0 32 65536
compare 0 8192

for memory in 0 32 65536; do
    figure "separate-cosine-$memory-1e-3-seed-0" --preset code --data "$data" --memory "$memory" \
        --plain-similarity cosine --learning-rate 1e-3 --seed 0 --eval-every 0
done
ended
