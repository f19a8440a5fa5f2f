#!/usr/bin/env bash
# A corpus that is not code, as bytes and with a vocabulary of 8,192 tokens learned from it; plain layers take products.
# Bits per byte can be compared between both, perplexity cannot. A model over tokens reads as many tokens as the one over
# bytes, so more text.
source "$(dirname "$0")/common.sh"
bytes=$(prose)
tokens=$(store "$bytes" prose-8192 8192)

for memory in 0 32 65536; do
    options=(--memory "$memory" --plain-similarity product --learning-rate 5e-4 --eval-every 0)
    figure "prose-bytes-$memory" --preset code --data "$bytes" "${options[@]}"
    figure "prose-tokens-$memory" --preset code --data "$tokens" "${options[@]}"
done
ended
