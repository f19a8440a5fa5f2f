#!/usr/bin/env bash
# Four rows of the paper's table 4 with its own presets and a vocabulary of 32,000 tokens learned from C sources, PIECE
# seconds each. This is another corpus than the paper's GitHub, and about a five-hundredth of its steps.
#
#   runs/paper.sh [cosine | product]   similarity of queries and keys in plain layers; the paper's is cosine
similarity=${1:-cosine}
kind=paper
if [ "$similarity" = product ]; then kind=product; fi
source "$(dirname "$0")/common.sh"
tokens=$(store "$(c_sources)" c-sources-32000 32000)

row() {
    local options=(--preset "paper-$1" --plain-similarity "$similarity" --data "$tokens" --eval-every 0)
    if [ -f "$RESULTS/$kind-$1.json" ]; then return; fi
    piece "$kind-$1" "${options[@]}" || true # its time is over
    evaluated "$kind-$1" "${options[@]}"
}

for sizes in 512-0-0 512-0-512 512-8192-512 512-65536-512; do
    spread row "$sizes"
done
ended
