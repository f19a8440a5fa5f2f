"""A small model of four layers, and segments for it to read."""

from __future__ import annotations

from typing import Any

import torch
from helpers.devices import seeded

from memtrans import MemorizingTransformer

BATCH, LENGTH, VOCABULARY = 2, 8, 30
SMALL = {"num_tokens": VOCABULARY, "dim": 16, "depth": 4, "dim_head": 8, "heads": 2, "num_retrieved_memories": 4}


def build(**options: Any) -> MemorizingTransformer:
    """The same parameters in every run."""
    torch.manual_seed(0)
    return MemorizingTransformer(**{**SMALL, "max_knn_memories": 40, **options})


def segments(count: int) -> torch.Tensor:
    """So many (BATCH, LENGTH), without the tokens 0 and 1."""
    return torch.randint(2, VOCABULARY, (count, BATCH, LENGTH), generator=seeded(3))
