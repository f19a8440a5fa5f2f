"""What a memory holds, as a table: a row for each document, its entries from old to new.

Shapes: B documents in scope, G key/value heads, M visible entries, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memtrans.memory.ids import NOTHING
from memtrans.memory.ring import Ring


class Entries(NamedTuple):
    """Copies of what the documents in scope hold, old to new from the first place on.

    Attributes:
        keys: (B, M, D), or (B, G, M, D) when kv_heads > 1; zeros in places that are not taken.
        values: likewise.
        mask: (B, M) bool, which places are taken: the first `lengths` of each document.
        ids: (B, M) int64, -1 in places that are not taken; None where ids are not kept.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor
    ids: Tensor | None


def entries_of(ring: Ring, rows: Tensor, documents: int) -> Entries:
    """The entries of the documents in scope. rows: (B·G,), of so many documents."""
    numbers, there = (tensor[rows] for tensor in ring.visible())

    def table(stored: Tensor, nothing: int) -> Tensor:
        found = ring.look_up(stored, rows, numbers)  # (B·G, M, ...)
        found[~there] = nothing
        return found.unflatten(0, (documents, -1))

    keys, values = table(ring.keys, 0), table(ring.values, 0)
    if keys.shape[1] == 1:
        keys, values = keys[:, 0], values[:, 0]
    ids = None if ring.ids is None else table(ring.ids.slots, NOTHING)[:, 0]
    return Entries(keys, values, there.unflatten(0, (documents, -1))[:, 0], ids)


def no_entries(
    shape: tuple[int, ...], dtype: torch.dtype | None, value_dtype: torch.dtype | None, ids: bool
) -> Entries:
    """Those of a memory that saw no tensor yet. shape: (B, M, 2, D), with G after B if there are several."""
    *rows, entries, _, width = shape
    keys = torch.zeros(*rows, entries, width, dtype=dtype)
    mask = torch.zeros(rows[0], entries, dtype=torch.bool)
    return Entries(
        keys, keys.to(value_dtype or keys.dtype, copy=True), mask, torch.full(mask.shape, NOTHING) if ids else None
    )
