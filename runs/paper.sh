#!/usr/bin/env bash
# Four rows of the paper's table 4 with its own presets and a vocabulary of 32,000 tokens learned from C sources, PIECE
# seconds each. This is another corpus than the paper's GitHub, and about a thousandth of its steps.
source "$(dirname "$0")/common.sh"
tokens=$(store "$(c_sources)" c-sources-32000 32000)

for row in 512-0-0 512-0-512 512-8192-512 512-65536-512; do
    if [ -f "$RESULTS/paper-$row.json" ]; then continue; fi
    options=(--preset "paper-$row" --data "$tokens" --eval-every 0)
    piece "paper-$row" "${options[@]}" || true # its time is over
    evaluated "paper-$row" "${options[@]}"
done
ended
