"""Rings laid out by hand, and whether a search over them is exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from helpers import checks
from torch import Tensor

from memtrans_kernels import knn_search

INF = float("inf")


@dataclass
class Memory:
    """A ring laid out by hand, and what each of its rows shows to a search, old to new."""

    keys: Tensor  # (R, M + S, D)
    start: Tensor  # (R,)
    cursor: Tensor  # (R,)
    capacity: int
    visible: list[Tensor]  # slots of each row

    @property
    def rows(self) -> int:
        return len(self.visible)


def memory(entries: list[tuple[int, Tensor]], capacity: int, spare: int = 0, *, hidden: float = INF) -> Memory:
    """One row for each (start, keys (C, D) ever added): entry i lies in slot i mod (M + S).

    Slots that a search must not see are filled with `hidden`.
    """
    width, dtype = entries[0][1].shape[1], entries[0][1].dtype
    slots = capacity + spare
    ring = torch.full((len(entries), slots, width), hidden, dtype=dtype)
    visible = []
    for row, (start, keys) in enumerate(entries):
        shown = torch.arange(max(start, len(keys) - capacity, 0), len(keys))
        ring[row, shown % slots] = keys[shown]
        visible.append(shown % slots)
    cursor = torch.tensor([len(keys) for _, keys in entries])
    return Memory(ring, torch.tensor([start for start, _ in entries]), cursor, capacity, visible)


def search(query: Tensor, held: Memory, k: int, backend: str, rows: list[int] | None = None) -> tuple[Tensor, Tensor]:
    rows = list(range(held.rows)) if rows is None else rows
    return knn_search(query, held.keys, torch.tensor(rows), held.start, held.cursor, held.capacity, k, backend=backend)


def assert_exact(query: Tensor, held: Memory, rows: list[int], scores: Tensor, slots: Tensor, k: int) -> None:
    """Every head of every document found the K nearest of its row, in float64."""
    batch, heads = query.shape[:2]
    groups = len(rows) // batch
    for b in range(batch):
        for h in range(heads):
            row = rows[b * groups + h // (heads // groups)]
            shown = held.visible[row]
            finite = shown[held.keys[row, shown].isfinite().all(dim=-1)]
            position = torch.full((held.keys.shape[1] + 1,), -2)  # of each slot among them; the last stands for slot -1
            position[finite], position[-1] = torch.arange(len(finite)), -1
            order = position[slots[b, h].long()]
            assert (order != -2).all(), "an entry that no search may see"
            keys = held.keys[row, finite]
            checks.assert_nearest(query[b, h].to(keys.dtype), keys, order, scores[b, h], k)
            checks.assert_older_first(keys, order)
