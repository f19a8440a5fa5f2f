#!/usr/bin/env bash
# Held-out bits per byte after five minutes of training steps on one GPU: C sources, without a memory and with 65,536
# entries, by AdamW and by Muon. A short run tells how many steps five minutes hold; the learning rate's decay ends with
# them. Starting and compiling come on top.
#
#   RATES        learning rates to try (1e-3)        BUDGET    seconds of steps (300)
#   OPTIMIZERS   what moves the weights (adamw muon)   MEMORIES   entries of the memory (0 65536)
source "$(dirname "$0")/common.sh"
RATES=${RATES:-1e-3}
BUDGET=${BUDGET:-300}
OPTIMIZERS=${OPTIMIZERS:-adamw muon}
MEMORIES=${MEMORIES:-0 65536}
data=$(c_sources)

for optimizer in $OPTIMIZERS; do
    for memory in $MEMORIES; do
        options=(--preset code --data "$data" --memory "$memory" --plain-similarity product)
        options+=(--optimizer "$optimizer" --eval-every 0)
        for rate in $RATES; do
            timed_figure "$BUDGET" "seconds-$BUDGET-$optimizer-$memory-$rate" "${options[@]}" --learning-rate "$rate"
        done
    done
done
ended
