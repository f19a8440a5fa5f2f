#!/usr/bin/env bash
# The late memory: a run trains with next to no memory, and gets 65,536 entries for the last part of its steps. What it
# is compared with are the runs of separate.sh.
source "$(dirname "$0")/common.sh"
data=$(c_sources)

for share in 0.1 0.25; do
    for rate in 1e-3 5e-4; do
        figure "late-$share-$rate" --preset code --data "$data" --memory-late "$share" --plain-similarity product \
            --learning-rate "$rate" --eval-every 0
    done
done
ended
