"""knn_add_ in plain PyTorch: the oracle of all tests, and the last-resort kernel.

With base = at[row], or cursor[row] without `at`, entry base + j is new entry first + j. It goes to slot
(base + j) mod (M + S), for first + j below count and only where it is not stored already (base + j >= cursor[row]) and
among the newest M + S. Then cursor[row] becomes at least base + count - first.

    keys (R, M + S, D), values (R, M + S, E) · cursor, at (R,) · rows, count, first (B·G,)
    new_keys (B, G, N, D), new_values (B, G, N, E)

A row with a number out of range (count, first, entry below 0 or beyond 2^62) stays as it is.

Source: Wu et al. 2022, section 3.2. Works on CPU and CUDA tensors alike, without a host round trip.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memtrans_kernels.checks import MOST_ENTRIES


def saturate(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts; what is beyond the largest number of `dtype`, infinity too, becomes that number. NaN stays NaN."""
    limit = torch.finfo(dtype).max
    return tensor.to(dtype).clamp(-limit, limit)


def knn_add_(
    keys: Tensor,  # (R, M + S, D)
    values: Tensor,  # (R, M + S, E)
    cursor: Tensor,  # (R,)
    rows: Tensor,  # (B·G,)
    new_keys: Tensor,  # (B, G, N, D)
    new_values: Tensor,  # (B, G, N, E)
    count: Tensor | None = None,  # (B·G,)
    at: Tensor | None = None,  # (R,)
    first: Tensor | None = None,  # (B·G,)
) -> None:
    """Entry base + j goes to slot (base + j) mod (M + S); what is stored already is left alone."""
    size, length = keys.shape[1], new_keys.shape[2]
    stored = cursor[rows]
    base = stored if at is None else at[rows]
    last = torch.full_like(base, length) if count is None else count
    skipped = torch.zeros_like(base) if first is None else first
    sound = _is_entry(stored) & _is_entry(base) & (last >= 0) & (last <= length)
    sound = sound & (skipped >= 0) & (skipped <= length)
    end = base + (last - skipped).clamp(min=0)

    window = min(length, size)  # consecutive entries, so no two of them share a slot
    entry = end[:, None] - window + torch.arange(window, device=keys.device)  # (B·G, window)
    fresh = sound[:, None] & (entry >= base[:, None]) & (entry >= stored[:, None])
    source = (entry - base[:, None] + skipped[:, None]).clamp(0, max(length - 1, 0))
    slot = entry % size
    for ring, new, keep_infinite in ((keys, new_keys, True), (values, new_values, False)):
        new = new.flatten(0, 1).gather(1, source[..., None].expand(-1, -1, new.shape[-1]))
        cast = saturate(new, ring.dtype)
        if keep_infinite:  # an infinite key must stay one, so that it is never retrieved
            cast = torch.where(new.isinf(), new.to(ring.dtype), cast)
        ring[rows[:, None], slot] = torch.where(fresh[..., None], cast, ring[rows[:, None], slot])
    cursor[rows] = torch.where(sound, torch.maximum(stored, end), stored)


def _is_entry(number: Tensor) -> Tensor:
    """Whether entries may be counted on from this one: no sum with a segment's length overflows."""
    return (number >= 0) & (number <= MOST_ENTRIES)
