"""The ids of a ring's entries: one number beside each key, and where each row's document began.

Entry i of a row has its id in the slot of its key, i mod (M + S). An id that nobody gave is the entry's position in its
document, which goes on counting when entries are dropped or removed, and begins again when the document is cleared.

    slots   (R, M + S) int64
    origin  (R,) int64, the number of the entry that the document began with; below 0 where a loaded document is older
            than the entries that were loaded

Shapes: R memory rows, M visible and S spare slots, B documents, G key/value heads, N entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memtrans.memory.layout import in_slots

NOTHING = -1  # the id where there is no entry


class KeptIds:
    """The ids of a ring of R rows and so many slots; see the module's docstring for its fields."""

    def __init__(self, rows: int, slots: int, device: torch.device) -> None:
        self.slots = torch.full((rows, slots), NOTHING, dtype=torch.int64, device=device)
        self.origin = torch.zeros(rows, dtype=torch.int64, device=device)

    def write(self, rows: Tensor, ids: Tensor, count: Tensor | None, *, cursor: Tensor, at: Tensor) -> None:
        """Writes the ids (B·G, N) of entries that `knn_add_` is about to write, to the same slots by the same rules.

        rows, count: (B·G,). cursor, at: (R,), as `knn_add_` takes them; it has not counted the cursor on yet.
        """
        size, length = self.slots.shape[1], ids.shape[1]
        base, stored = at[rows], cursor[rows]
        end = base + (length if count is None else count)
        window = min(length, size)  # consecutive entries, so no two of them share a slot
        entry = end[:, None] - window + torch.arange(window, device=rows.device)  # (B·G, window)
        fresh = (entry >= base[:, None]) & (entry >= stored[:, None])
        place, slot = (entry - base[:, None]).clamp(0, length - 1), (rows[:, None], entry % size)
        self.slots[slot] = torch.where(fresh, ids.gather(1, place), self.slots[slot])


def positions(rows: Tensor, length: int, *, at: Tensor, origin: Tensor) -> Tensor:
    """The positions in their documents of the next N entries of each row in scope: (B·G, N).

    rows: (B·G,). at, origin: (R,).

    >>> positions(torch.tensor([1]), 3, at=torch.tensor([9, 7]), origin=torch.tensor([0, 5])).tolist()
    [[2, 3, 4]]
    """
    return (at - origin)[rows][:, None] + torch.arange(length, device=rows.device)


def read_ids(slots: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """The ids in the slots (B, H, ...) that a search found, NOTHING where it found none.

    rows: (B·G,), H a multiple of G. ids: (R, M + S).

    >>> read_ids(torch.tensor([[[2, -1]]]), torch.tensor([0]), torch.tensor([[7, 8, 9]])).tolist()
    [[[9, -1]]]
    """
    return torch.where(slots >= 0, in_slots(ids, rows, slots), NOTHING)


def check_kept(ids: Tensor | None) -> Tensor:
    """The ids (R, M + S) that a memory keeps; raises ValueError where it keeps none."""
    if ids is None:
        raise ValueError("keep_ids must be True for the ids of entries to be known, got False")
    return ids
