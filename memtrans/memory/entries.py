"""What a memory holds, as a table: a row for each document, its entries from old to new.

Shapes: B documents in scope, G key/value heads, M visible entries, D width of keys, E of values.
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
        values: (B, M, E), or (B, G, M, E), likewise.
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
    shape: tuple[int, ...],
    widths: tuple[int, int],
    dtypes: tuple[torch.dtype | None, torch.dtype | None],
    ids: bool,
) -> Entries:
    """Those of a memory that saw no tensor yet.

    shape: (B, M), or (B, G, M) if G > 1. widths: D and E. dtypes: of keys and values, None for the default.
    """
    keys = torch.zeros(*shape, widths[0], dtype=dtypes[0])
    values = torch.zeros(*shape, widths[1], dtype=dtypes[1] or keys.dtype)
    mask = torch.zeros(shape[0], shape[-1], dtype=torch.bool)
    return Entries(keys, values, mask, torch.full(mask.shape, NOTHING) if ids else None)
