"""Where entries lie in a ring, and a ring laid out anew: every entry is copied, the storage of before stays as it is.

Shapes: R memory rows, M visible entries, E entries that are looked at, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

NO_ENTRY = torch.iinfo(torch.int64).min  # in place of an entry's number


def visible(start: Tensor, cursor: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The numbers of the entries that a search may find, old to new from the first place on, and which places are
    taken: (R, M) each.

    >>> entry, there = visible(torch.tensor([0, 6]), torch.tensor([9, 7]), capacity=3)
    >>> entry.tolist(), there.tolist()
    ([[6, 7, 8], [6, 7, 8]], [[True, True, True], [True, False, False]])
    """
    first = torch.maximum(start, cursor - capacity).clamp(min=0)
    entry = first[:, None] + torch.arange(capacity, device=cursor.device)
    return entry, entry < cursor[:, None]


def without(start: Tensor, cursor: Tensor, gone: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What becomes of a ring without some entries: those that stay become the newest, in their order.

    gone: (R, M) bool, over `visible`.

    Returns which entry, or NO_ENTRY, becomes each of the newest M (R, M), the numbers of these (R, M), and how many
    stay (R,).

    >>> one = torch.tensor([1])
    >>> source, target, count = without(0 * one, 3 * one, torch.tensor([[False, True, False]]))
    >>> source[0, 1:].tolist(), target.tolist(), count.tolist()
    ([0, 2], [[0, 1, 2]], [2])
    """
    capacity = gone.shape[1]
    entry, there = visible(start, cursor, capacity)
    stays = there & ~gone
    order = stays.to(torch.uint8).argsort(dim=1, stable=True)  # old to new, the ones that stay last
    source = torch.where(stays.gather(1, order), entry.gather(1, order), NO_ENTRY)
    target = cursor[:, None] - capacity + torch.arange(capacity, device=cursor.device)
    return source, target, stays.sum(dim=1)


def in_slots(ring: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """What a ring (R, M + S, ...) holds in the slots (B, H, ...) that a search found: (B, H, ..., ...); zeros where
    it found none.

    rows: (B·G,), H a multiple of G.

    >>> in_slots(torch.tensor([[7, 8, 9]]), torch.tensor([0]), torch.tensor([[[2, -1]]])).tolist()
    [[[9, 0]]]
    """
    batch, heads = slots.shape[:2]
    row = rows.reshape(batch, -1).repeat_interleave(heads * batch // rows.numel(), dim=1)  # (B, H)
    row = row.reshape(batch, heads, *[1] * (slots.dim() - 2))
    found = ring[row, slots.clamp(min=0).long()]
    found[slots < 0] = 0
    return found


def laid_out(ring: Tensor, source: Tensor, target: Tensor, slots: int) -> Tensor:
    """A ring (R, `slots`, ...) in which entry `source` of this one (R, slots before, ...) is entry `target`.

    source, target: (R, E); NO_ENTRY becomes zeros.
    """
    row = torch.arange(source.shape[0], device=source.device)[:, None]
    entries = ring[row, source % ring.shape[1]]
    entries[source == NO_ENTRY] = 0
    new = ring.new_zeros(ring.shape[0], slots, *ring.shape[2:])
    new[row, target % slots] = entries
    return new
