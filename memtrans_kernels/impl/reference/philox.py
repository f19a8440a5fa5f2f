"""Philox 4x32-10 in integer arithmetic: the random numbers of dropout, the same bits in every backend.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A counter (column, query, head,
document) and a 64-bit seed give one 32-bit number; a probability is dropped where that number is below p · 2^32.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF


def philox(seed: Tensor, counters: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """The first of the four 32-bit words, as int64 in [0, 2^32), for counters that broadcast against each other."""
    c0, c1, c2, c3 = counters
    key0, key1 = seed & LOW, (seed >> 32) & LOW
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # int64 wraps; the 64 bits are right
        c0, c1 = ((product1 >> 32) & LOW) ^ c1 ^ key0, product1 & LOW
        c2, c3 = ((product0 >> 32) & LOW) ^ c3 ^ key1, product0 & LOW
        key0, key1 = (key0 + KEY_STEPS[0]) & LOW, (key1 + KEY_STEPS[1]) & LOW
    return c0


def keep_mask(seed: Tensor, dropout_p: float, shape: tuple[int, ...]) -> Tensor:
    """Which probabilities (B, H, N, columns) dropout keeps; columns are the K neighbours, then the L local keys."""
    document, head, query, column = (
        torch.arange(size, device=seed.device).reshape([-1 if axis == a else 1 for a in range(4)])
        for axis, size in enumerate(shape)
    )
    return philox(seed, (column, query, head, document)) >= int(dropout_p * 2**32)
