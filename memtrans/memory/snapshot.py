"""A memory as one forward pass sees it: what is searched, attended to, told to who watches, and stored.

All its cursors are read once; every search of the pass uses them, whatever is added meanwhile. The storage is the
ring's (`ring.py`).

Shapes: the letters of `memtrans_kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memtrans.local_keys import LocalKeys, seed_of
from memtrans.memory.checks import check_mask, running_backward, scoping, widths_named
from memtrans.memory.ids import check_kept, positions, read_ids
from memtrans.memory.layout import in_slots
from memtrans.memory.observation import Observation, as_given, keys_as_given, local_weights, retrieved_weights
from memtrans.memory.parts import Asking, Weighing, attend_to_local, mixed
from memtrans.memory.whole import attend_to_whole
from memtrans_kernels import (
    Ledger,
    gather_pairs,
    knn_add_,
    knn_search,
    ledger_advance_,
    memory_attention,
    merge_attention,
)
from memtrans_kernels.backends import implements
from memtrans_kernels.ledger import OUT_OF_SCOPE, check_not_stale, stored_since

if TYPE_CHECKING:
    from memtrans.memory.ring import Ring


@dataclass(frozen=True)
class MemorySnapshot:
    """A memory as one forward pass sees it: the cursors are read once, whatever is added later.

    Searching and adding through a snapshot can be repeated (activation checkpointing recomputes the forward): it finds
    the same neighbours and stores the same entries in the same slots.

    Attributes:
        ring: the storage.
        rows: (B·G,) int64, the ring rows in scope.
        documents: B.
        start: (R,) int64, as it stood.
        cursor: (R,) int64, as it stood.
        keys: (R, M + S, D), to read; a ring that was laid out again since no longer holds all that this sees.
        values: (R, M + S, E), likewise.
        ticket: (R,) int64 on the host, the counts as they stood.
        written: (R,) int64 on the host, the counts of this storage, which go on.
        clearings: (R,) int64, how often each row was cleared, as it stood.
        ids: (R, M + S) int64, to read, where ids are kept.
        origin: (R,) int64, the entry that each row's document began with, as it stood, where ids are kept.
        read_only: whether it is of a view, in which rows may repeat.
        cleared_elsewhere: after clearing a memory of several ranks, which documents (B,) bool a rank before this one
            has cleared, and which one behind it; None of a memory of one.
        in_order: whether `rows` are all rows of the ring, one after the other.
    """

    ring: Ring
    rows: Tensor
    documents: int
    start: Tensor
    cursor: Tensor
    keys: Tensor
    values: Tensor
    ticket: Tensor
    written: Tensor
    clearings: Tensor
    ids: Tensor | None = None
    origin: Tensor | None = None
    read_only: bool = False
    cleared_elsewhere: tuple[Tensor, Tensor] | None = None
    in_order: bool = False

    def check_fits(self, name: str, documents: int, kv_heads: int, width: int, value_width: int) -> None:
        """Raises ValueError unless the snapshot is of so many documents and key/value heads, and of these widths."""
        expected = (documents, kv_heads, width, value_width)
        found = (self.documents, self.rows.numel() // self.documents, self.keys.shape[2], self.values.shape[2])
        if found != expected:
            wanted, got = (f"kv_heads={heads} and {widths_named(*widths)}" for _, heads, *widths in (expected, found))
            raise ValueError(
                f"{name} must have the batch's {documents} documents in scope, {wanted}, "
                f"got {found[0]} documents, {got}{scoping(found[0], documents)}"
            )

    def live(self) -> MemorySnapshot:
        """The same rows as they stand whenever they are read, instead of now.

        For a step that adds nothing and is replayed: it finds the memory where it lies, for as long as no longer
        segment makes it lay itself out again.
        """
        ticket = torch.full_like(self.ticket, OUT_OF_SCOPE)  # it is never late
        origin = None if self.ring.ids is None else self.ring.ids.origin
        return replace(self, start=self.ring.start, cursor=self.ring.cursor, ticket=ticket, origin=origin)

    def to_read(self) -> MemorySnapshot:
        """The same, to search alone: adding to it or clearing it raises TypeError."""
        return replace(self, read_only=True)

    def _check_writable(self) -> None:
        if self.read_only:
            raise TypeError(
                "the memory must be its owner's to change, got a view that `expand` made, to read alone: "
                "pass add_knn_memory=False, or give the memory itself"
            )

    @property
    def ledger(self) -> Ledger:
        """What attention's backward needs to notice that it comes too late."""
        return Ledger(self.written, self.ticket, self.keys.shape[1] - self.ring.capacity)

    def check_current(self) -> None:
        """Raises StaleMemoryError where what this sees may be overwritten; a compiled graph asks in attention."""
        if not torch.compiler.is_compiling():
            check_not_stale(*self.ledger)

    def nearest(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores and slots (B, H, N, K) of the nearest keys of query (B, H, N, D).

        Raises StaleMemoryError where more than `spare` entries were added since, and may stand in their places.
        """
        ring = self.ring
        self.check_current()
        return knn_search(query, self.keys, self.rows, self.start, self.cursor, ring.capacity, k, backend=ring.backend)

    def pairs(self, query: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (B, H, N, K, 2, D) of the nearest entries in the query's dtype, zeros where there is none;
        and scores and slots, as `nearest` gives them. Needs values as wide as keys; see `found`."""
        scores, slots = self.nearest(query, k)
        backend = self.ring.backend if implements("gather_pairs", self.ring.backend) else "auto"
        pairs = gather_pairs(self.keys, self.values, self.rows, slots, query.dtype, backend=backend)
        return pairs, scores, slots

    def found(self, query: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`pairs`, of values of any width: keys (B, H, N, K, D) and values (B, H, N, K, E) by themselves."""
        scores, slots = self.nearest(query, k)
        keys, values = (in_slots(ring, self.rows, slots).to(query.dtype) for ring in (self.keys, self.values))
        return keys, values, scores, slots

    def ids_of(self, slots: Tensor) -> Tensor:
        """The ids of entries in slots (B, H, ...) that `nearest` found, -1 where it found none.

        Raises ValueError where ids are not kept.
        """
        return read_ids(slots, self.rows, check_kept(self.ids))

    # ------------------------------------------------------------------------------------------------------- attention

    def attend(
        self,
        query: Tensor,
        k: int | None,
        local: LocalKeys,
        scale: Tensor,
        memory_offset: Tensor | None = None,
        memory_gate: Tensor | None = None,
        dropout_p: float = 0.0,
        asking: Asking | None = None,
    ) -> Tensor:
        """Attention of query (B, H, N, D) to its K nearest entries and to the local keys: (B, H, N, E).

        Args:
            k: K; None for all entries that may be seen, without a search.
            local: the local context.
            scale: (H,), what logits are multiplied by.
            memory_offset: (H,), added to the retrieved logits. Default: nothing.
            memory_gate: (H,); each part then has a softmax of its own, and sigmoid(memory_gate) is the share of the
                retrieved part. Default: one softmax over both.
            dropout_p: probability of dropping a weight.
            asking: what the entries are found and weighed with. Default: `query` and `scale`.
        """
        weighing = Weighing(scale, memory_offset, memory_gate, dropout_p, asking)
        if k is None:
            return attend_to_whole(self, query, local, weighing)
        if memory_gate is not None or asking is not None:
            return self.attend_in_parts(query, k, local, weighing)
        scores, slots = self._nearest_seen(query, k, local.query_mask)
        out, lse = memory_attention(
            query, local.key, local.value, self.keys, self.values, self.rows, scores, slots, scale,
            local.bias_table, local.bias_dense, memory_offset, local.local_length,
            dropout_p, seed_of(dropout_p, query.device), ledger=self.ledger,
            causal=local.causal, first=local.first, soft_cap=local.soft_cap, sink=local.sink,
        )  # fmt: skip
        if self.ring.watch.looks:
            self.tell(query, local, scores, slots, (scale, scale), (lse, lse), memory_offset)
        return out

    def attend_in_parts(self, query: Tensor, k: int, local: LocalKeys, weighing: Weighing) -> Tensor:
        """`attend`, by attention to the neighbours and attention to the local keys, put together at the end."""
        scale, memory_offset, memory_gate, dropout_p, asking = weighing
        asked, memory_scale = (query, scale) if asking is None else asking
        to_memory, memory_lse, scores, slots = self.attend_to_retrieved(
            asked, k, memory_scale, dropout_p, local.query_mask, local.soft_cap
        )
        to_local, local_lse = attend_to_local(query, local, scale, dropout_p)
        share, lses = None, (memory_lse, local_lse)
        if memory_gate is not None:
            memory_offset, share = None, memory_share(slots, memory_gate)
            out = mixed(to_memory, to_local, share)
        else:
            if memory_offset is not None:
                memory_lse = memory_lse + memory_offset[:, None]
            memory_lse = memory_lse.masked_fill(slots[..., 0] < 0, -torch.inf)
            out, lse = merge_attention(torch.stack((to_memory, to_local)), torch.stack((memory_lse, local_lse)))
            lses = lse, lse
        if self.ring.watch.looks:
            self.tell(query, local, scores, slots, (memory_scale, scale), lses, memory_offset, share)
        return out

    @torch.no_grad()
    def tell(
        self,
        query: Tensor,
        local: LocalKeys,
        scores: Tensor,
        slots: Tensor,
        scales: tuple[Tensor, Tensor],
        lses: tuple[Tensor, Tensor],
        memory_offset: Tensor | None = None,
        share: Tensor | None = None,
    ) -> None:
        """Tells who watches the memory what `attend` did with scores and slots (B, H, N, K).

        scales, lses: (H,) and (B, H, N) each, of the softmax of the retrieved entries and of that of the local keys.
        share: (B, H, N), of the retrieved part, with a gate.
        """
        watch, padding, of_local = self.ring.watch, local.padding, None
        assert watch.tell is not None
        if watch.wants_local:
            local_share = None if share is None else 1.0 - share
            of_local = local_weights(query, local, scales[1], lses[1], local_share)
            of_local = as_given(keys_as_given(of_local, padding), padding)
        weights = retrieved_weights(scores, scales[0], lses[0], memory_offset, share, local.soft_cap)
        positions = as_given(self.positions(slots), padding)
        watch.tell(Observation(self.numbers(), positions, as_given(weights, padding), of_local))

    def numbers(self) -> Tensor:
        """The numbers of the documents in scope (B,) int64; of a view's rows, in which documents repeat, their own."""
        if self.read_only:
            return torch.arange(self.documents, device=self.rows.device)
        return self.rows.reshape(self.documents, -1)[:, 0] * self.documents // self.rows.numel()

    def of_heads(self, counts: Tensor, heads: int) -> Tensor:
        """Looks up numbers of rows (R,) for each document and query head in scope: (B, H)."""
        of_rows = counts[self.rows].reshape(self.documents, -1)
        return of_rows.repeat_interleave(heads // of_rows.shape[1], dim=1)

    def entries_in(self, slots: Tensor) -> Tensor:
        """The numbers of the entries in slots (B, H, N, K), int64; -1 for none."""
        newest = self.of_heads(self.cursor, slots.shape[1])[:, :, None, None] - 1
        entries = newest - (newest - slots) % self.keys.shape[1]
        return entries.masked_fill(slots < 0, -1)

    def positions(self, slots: Tensor) -> Tensor:
        """The ids of the entries in slots (B, H, N, K), which are positions unless somebody gave others, int64; without
        ids, how many entries the document stored before each. -1 for none."""
        return self.since(self.start, slots) if self.ids is None else self.ids_of(slots)

    def since(self, first: Tensor, slots: Tensor) -> Tensor:
        """How many entries came since the first ones (R,) and before those in slots (B, H, N, K); -1 for none."""
        entries = self.entries_in(slots)
        return (entries - self.of_heads(first, slots.shape[1])[:, :, None, None]).masked_fill(entries < 0, -1)

    def _nearest_seen(self, query: Tensor, k: int, query_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """`nearest`, without any for queries where the mask (B, N) is False: their slots are -1."""
        scores, slots = self.nearest(query, k)
        if query_mask is None:
            return scores, slots
        hidden = ~query_mask[:, None, :, None]
        return scores.masked_fill(hidden, -torch.inf), slots.masked_fill(hidden, -1)

    def attend_to_retrieved(
        self,
        query: Tensor,
        k: int,
        scale: Tensor,
        dropout_p: float = 0.0,
        query_mask: Tensor | None = None,
        soft_cap: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Attention of query (B, H, N, D) to its K nearest entries alone, with logits scale[h] · score.

        query_mask: (B, N) bool, False for queries that see none. soft_cap: what bounds a logit.

        Returns out (B, H, N, E) and lse (B, H, N), differentiable in query and scale, and scores and slots as
        `nearest` does.
        """
        scores, slots = self._nearest_seen(query, k, query_mask)
        out, lse = memory_attention(
            query, *self.no_local_keys(query), self.keys, self.values, self.rows, scores, slots, scale,
            dropout_p=dropout_p, seed=seed_of(dropout_p, query.device), soft_cap=soft_cap, ledger=self.ledger,
        )  # fmt: skip
        return out, lse, scores, slots

    def no_local_keys(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Key (B, G, 0, D) and value (B, G, 0, E) of the query's dtype and device."""
        groups = self.rows.numel() // self.documents
        key, value = (query.new_empty(self.documents, groups, 0, ring.shape[2]) for ring in (self.keys, self.values))
        return key, value

    # ------------------------------------------------------------------------------------------------------ add, clear

    def append(
        self, keys: Tensor, values: Tensor, count: Tensor | None = None, ids: Tensor | None = None
    ) -> MemorySnapshot:
        """Stores keys (B, G, N, D) and values (B, G, N, E) after the snapshot's entries; returns the state after them.

        A forward pass that a backward pass runs again has stored them: nothing is written then.

        Args:
            count: (B,) int64, how many of the N each document stores. Default: all.
            ids: (B, N) int64, where ids are kept. Default: positions in the document.

        Raises StaleMemoryError where entries were added since the snapshot was made, or the ring would grow too large.
        """
        ring, length = self.ring, keys.shape[2]
        ring.clearings.note_segment()
        if length == 0:
            return self
        groups = keys.shape[1]
        count = count if count is None or groups == 1 else count.repeat_interleave(groups)
        ticket, again = self.advance(length)
        if not again:
            self._append_ids(ids, length, count)
            backend = ring.backend if implements("knn_add_", ring.backend) else "auto"
            knn_add_(
                ring.keys, ring.values, ring.cursor, self.rows, keys, values, count, at=self.cursor, backend=backend
            )
        if self.in_order:
            cursor = self.cursor + (length if count is None else count)
        else:
            added = torch.full_like(self.rows, length) if count is None else count
            cursor = self.cursor.index_add(0, self.rows, added)
        return self.behind(cursor, ticket, again)

    def _append_ids(self, ids: Tensor | None, length: int, count: Tensor | None) -> None:
        """Stores ids (B, N), or positions, of what `append` is about to store. count: (B·G,)."""
        kept = self.ring.ids
        if kept is None or self.origin is None:
            return
        if ids is None:
            ids = positions(self.rows, length, at=self.cursor, origin=self.origin)
        else:
            ids = ids.repeat_interleave(self.rows.numel() // self.documents, dim=0)
        kept.write(self.rows, ids, count, cursor=self.ring.cursor, at=self.cursor)

    def advance(self, length: int) -> tuple[Tensor, bool]:
        """Counts `length` more entries, for which the ring makes room; the ticket after them, and whether they are
        there already, because a backward pass runs a forward pass again."""
        self._check_writable()
        ring, again = self.ring, False
        if not torch.compiler.is_compiling():
            again = running_backward() != -1 and stored_since(ring.written, self.ticket)
            if not again:
                ring.make_room(self.ticket, length)
        return ledger_advance_(ring.written, self.ticket, length), again

    def behind(self, cursor: Tensor, ticket: Tensor, again: bool) -> MemorySnapshot:
        """The memory after entries were added: its cursors (R,) and its ticket (R,); see `advance`."""
        ring = self.ring
        if again:
            if bool(((ticket == OUT_OF_SCOPE) | (ticket <= self.written)).all()):
                return replace(self, cursor=cursor, ticket=ticket)  # as the first forward pass left this storage
            if int((ring.laid_out - ticket).max()) > ring.carried:
                ticket = ticket - ring.spare  # the new storage did not take over all of it: a search is too late
        ids = None if ring.ids is None else ring.ids.slots
        return replace(
            self, cursor=cursor, keys=ring.keys_read, values=ring.values_read, ticket=ticket, written=ring.written_read,
            ids=ids,
        )  # fmt: skip

    def clear_rows(self, mask: Tensor) -> MemorySnapshot:
        """Forgets all entries of the documents where mask (B,) is True; returns the state after that."""
        self._check_writable()
        check_mask(mask, self.documents, self.start.device)
        return self.cleared(mask)

    def cleared(self, mask: Tensor) -> MemorySnapshot:
        """`clear_rows`, for callers who know that the mask fits."""
        groups = self.rows.numel() // self.documents
        cleared = mask if groups == 1 else mask.repeat_interleave(groups)
        if not self.in_order:
            cleared = torch.zeros_like(self.start, dtype=torch.bool).index_copy(0, self.rows, cleared)
        start = torch.where(cleared, self.cursor, self.start)
        self.ring.start.copy_(torch.maximum(self.ring.start, start))  # a recomputed forward clears nothing newer
        clearings = self.clearings + cleared
        self.ring.clearings.go_on(clearings)
        if self.ring.ids is None or self.origin is None:
            return replace(self, start=start, clearings=clearings)
        origin = torch.where(cleared, self.cursor, self.origin)
        self.ring.ids.origin.copy_(torch.maximum(self.ring.ids.origin, origin))
        return replace(self, start=start, clearings=clearings, origin=origin)

    def cleared_since(self, clearings: Tensor) -> Tensor:
        """Which documents in scope (B,) bool were cleared since their rows' counts were `clearings` (R,)."""
        return (clearings < self.clearings)[self.rows].reshape(self.documents, -1)[:, 0]


def memory_share(slots: Tensor, memory_gate: Tensor) -> Tensor:
    """sigmoid(memory_gate (H,)) for each query (B, H, N); 0 where slots (B, H, N, K) hold nothing."""
    return torch.where(slots[..., 0] >= 0, memory_gate.sigmoid()[:, None], 0.0)  # the best come first
