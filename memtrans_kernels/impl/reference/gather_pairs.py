"""gather_pairs in plain PyTorch: the oracle of all tests, and the last-resort kernel.

pairs[b, h, n, k] = keys and values[rows[b·G + h // (H / G)], slots[b, h, n, k]], zeros where the slot is -1.

    keys, values (R, M + S, D) · rows (B·G,) · slots (B, H, N, K) -> pairs (B, H, N, K, 2, D)

Source: Wu et al. 2022, section 3.1, as upstream's `KNNMemory.search` returns it. Works on CPU and CUDA tensors alike,
without a host round trip.
"""

from __future__ import annotations

import torch
from torch import Tensor

GATHERED_BYTES = 1 << 24  # of keys or values held at once, beside the result: 16 MiB


def gather_pairs(keys: Tensor, values: Tensor, rows: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """In blocks of queries, each cast and masked where it lies in the result."""
    batch, heads, _, neighbours = slots.shape
    width = keys.shape[2]
    row = rows.reshape(batch, -1).repeat_interleave(heads * batch // max(rows.numel(), 1), dim=1)[..., None, None]
    pairs = torch.empty(*slots.shape, 2, width, dtype=dtype, device=keys.device)
    block = max(1, GATHERED_BYTES // max(1, batch * heads * neighbours * width * 8))
    for part, of_part in zip(pairs.split(block, dim=2), slots.split(block, dim=2), strict=True):
        slot = of_part.clamp(min=0)
        for place, ring in enumerate((keys, values)):
            part[..., place, :] = ring[row, slot]
        part.masked_fill_((of_part < 0)[..., None, None], 0.0)
    return pairs
