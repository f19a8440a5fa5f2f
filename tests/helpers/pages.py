"""Records that were made up, to be shown."""

from __future__ import annotations

import torch

from memtrans.inspection.records import Records, Written
from memtrans.inspection.trace import Trace
from memtrans.memory.observation import Observation

PLANTED = "</script><img src=x onerror=alert(1)>"
HEADS, NEIGHBOURS, PROMPT = 3, 6, 4
COMMON, FACT = 11, 500  # an entry that every query finds; where the fact begins


def records(tokens: int = 20, document: int = 3000, layers: int = 2) -> Records:
    """Written token i came from entry FACT + i; the document and what is written hold the planted text."""
    generator = torch.Generator("cpu").manual_seed(0)
    words = [f" word{place}" for place in range(document)]
    words[FACT : FACT + tokens] = [f" fact{place}\n" for place in range(tokens)]
    words[FACT + 3] = " " + PLANTED
    trace, queries = Trace(), PROMPT + tokens - 1
    for layer in range(layers):
        positions = torch.randint(document, (1, HEADS, queries, NEIGHBOURS), generator=generator, device="cpu")
        weights = torch.full(positions.shape, 0.002, device="cpu")
        positions[..., 0], weights[..., 0] = COMMON, 0.1
        positions[0, :, PROMPT - 1 :, 1] = FACT + torch.arange(tokens, device="cpu")
        weights[0, :, PROMPT - 1 :, 1] = 0.01 + 0.5 * torch.linspace(0, 1, tokens, device="cpu")
        trace.watcher(layer)(Observation(torch.zeros(1, dtype=torch.int64, device="cpu"), positions, weights))
    written = [Written(f" fact{place}", PROMPT - 1 + place) for place in range(tokens)]
    written[3] = Written(" " + PLANTED, PROMPT + 2)
    names = {layer: f"layer {2 * layer}" for layer in range(layers)}
    return Records(trace, 0, words, f"What is it? {PLANTED}", written, names, f"a {PLANTED} book", f"{PLANTED} model")
