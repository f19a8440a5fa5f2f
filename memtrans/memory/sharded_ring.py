"""A rank's share of the slots of a memory that is spread over ranks: what is stored where, and in which order.

What a search of it does is in `sharded.py`, with the shapes' letters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from memtrans.distributed.ranks import Ranks
from memtrans.memory.exchange import fetched, from_all
from memtrans.memory.layout import NO_ENTRY, visible, without
from memtrans.memory.ring import Ring
from memtrans.memory.sharded import ShardedSnapshot
from memtrans.memory.snapshot import MemorySnapshot
from memtrans.memory.state import SHARD, held
from memtrans_kernels import knn_add_, ledger_ticket, read_cursors
from memtrans_kernels.backends import implements


class ShardedRing(Ring):
    """This rank's share of the slots of R rows, and the counts of the whole memory, which every rank keeps.

    Attributes:
        ranks: those that hold the memory.
        most: M of the whole memory; `capacity` is this rank's share of it, rounded up.
        total: (R,) int64, entries ever stored on all ranks together.
        start: (R,) int64, the first entry that a row holds, counted on all ranks together.
        cursor: (R,) int64, how many of the `total` entries are on this rank.
    """

    def __init__(self, rows: int, capacity: int, spare: int, dim: int, *, ranks: Ranks, **storage: Any) -> None:
        super().__init__(rows, -(-capacity // ranks.size), spare, dim, **storage)
        self.ranks, self.most = ranks, capacity
        self.total = torch.zeros_like(self.cursor)

    def make_room(self, ticket: Tensor, length: int) -> None:
        """Does nothing: all ranks lay their shares out alike, and each knows of its own backward passes alone."""

    def own(self, entries: Tensor) -> Tensor:
        """How many of the first `entries` entries of a row are on this rank."""
        return held(entries, self.ranks.rank, self.ranks.size)

    def lengths(self) -> Tensor:
        """How many entries each row holds, on all ranks together: (R,)."""
        return (self.total - self.start).clamp(max=self.most)

    def snapshot(self, rows: Tensor, host_rows: Sequence[int], documents: int) -> MemorySnapshot:
        """A snapshot of the memory as it stands on all ranks."""
        ticket = ledger_ticket(self.written, host_rows)
        start, total = read_cursors(self.start, self.total)
        return ShardedSnapshot(
            self, rows, documents, start, total, self.keys_read, self.values_read, ticket, self.written_read,
            self.clearings.as_they_stand(), *self.ids_seen(),
        )  # fmt: skip

    def visible(self) -> tuple[Tensor, Tensor]:
        """The entries of the whole memory that a search may find; see `layout.visible`."""
        return visible(self.start, self.total, self.most)

    def look_up(self, ring: Tensor, rows: Tensor, entries: Tensor) -> Tensor:
        """Entries (B·G, E) of the whole memory, by number, on all ranks; they ask together."""
        return fetched(ring, rows, entries, total=self.total, share=self.capacity, ranks=self.ranks)

    def _removal(self, gone: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """See `Ring`; what one rank removes all remove, and entries change ranks."""
        gone = from_all(gone.to(torch.uint8), self.ranks).bool().any(dim=0)
        source, _, count = without(self.start, self.total, gone)
        own, _ = self.window(self.capacity)
        place = own * self.ranks.size + self.ranks.rank - (self.total - self.most)[:, None]
        source = torch.where(place >= 0, source.gather(1, place.clamp(min=0)), NO_ENTRY)
        rows = torch.arange(len(own), device=own.device)

        def moved(ring: Tensor) -> Tensor:
            new = torch.zeros_like(ring)
            new[rows[:, None], own % ring.shape[1]] = self.look_up(ring, rows, source)
            return new

        return moved, self.total - count

    def state(self) -> dict[str, Tensor]:
        """The state of this rank's shard, in copies; `memtrans.memory.state` describes it."""
        first = self.own(self.total - self.lengths())
        most = int((self.cursor - first).max())
        shard = torch.tensor([self.ranks.rank, self.ranks.size], device="cpu")
        counts = {"lengths": self.lengths(), "entries": self.total.clone(), **self.counts(self.total)}
        return {**self.newest(most), **counts, SHARD: shard}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes up the state of this rank's shard, or this rank's entries of a whole memory's state."""
        device, of_entries = self.cursor.device, [state[name] for name in ("keys", "values", "ids") if name in state]
        lengths = state["lengths"].to(device)
        if SHARD in state:
            total, longest = state["entries"].to(device), int(lengths.max())
        else:
            longest = state["keys"].shape[1]
            total = torch.full_like(lengths, longest)
            of_entries = [tensor[:, self.ranks.rank :: self.ranks.size] for tensor in of_entries]
        length = of_entries[0].shape[1]
        total = total + self.ranks.size * longest  # rows that hold less than the longest must not begin before entry 0
        self.total.copy_(total)
        self.start.copy_(total - lengths)
        self.load_clearings(state)
        if self.ids is not None:
            self.ids.origin.copy_(total - state["positions"].to(device))
        rows = torch.arange(total.shape[0], device=device)
        keys, values, *ids = (tensor.to(device)[:, None] for tensor in of_entries)
        if length:
            count, at = torch.full_like(rows, length), self.own(total) - length
            self.add(rows, keys, values, ids[0][:, 0] if ids else None, count=count, at=at)

    def add(self, rows: Tensor, keys: Tensor, values: Tensor, ids: Tensor | None, count: Tensor, at: Tensor) -> None:
        """Stores the first `count` (B·G,) of keys (B, G, N, D), values (B, G, N, E), and ids (B·G, N) where they are
        kept, on this rank, behind its first `at` (R,)."""
        if self.ids is not None and ids is not None:
            self.ids.write(rows, ids, count, cursor=self.cursor, at=at)
        backend = self.backend if implements("knn_add_", self.backend) else "auto"
        knn_add_(self.keys, self.values, self.cursor, rows, keys, values, count, at=at, backend=backend)


# -------------------------------------------------------------------------------------------------------------- search
