"""A memory whose slots are spread over ranks: W processes hold and search one memory together, exactly.

Entry i of a row is on rank i mod W, which keeps it in a ring of its own as its entry i // W. So every rank holds the
same share of each row, of the oldest entries as of the newest, and M grows with the number of GPUs. All ranks speak of
the same documents, each reads a segment of its own of every document, and all call each method together:

    search   sees what the memory held before this step, for every rank
    add      stores the segments of all ranks, in the order of the ranks
    clear    forgets a document on all ranks when one of them forgets it

To search, each rank sends its queries to the others and answers theirs with its K best keys. The rank that asked merges
the answers by score, older entries first among equals, and tells the others which of their keys won: the same
neighbours that one memory of all entries would find. Then one of two things travels: the keys and values of the
winners, or, from each rank, its part of the softmax (`out` and `lse`), which the rank that asked merges exactly.

For one query a rank receives from each of the W - 1 others, with e bytes a number, D·e bytes for their query, 8·K for
their candidates (score and slot) and K for which of its own won. A partial result is D·e + 4 bytes more, and a backward
pass then sends D·e + 4 and D·e. The winners are K / W entries, on average, of D numbers as they are stored: the value,
and the key too where a gradient is wanted; a backward pass then sends nothing. `attend_to_retrieved` takes what is
fewer bytes in both passes together. With K = 32, D = 64 and two bytes a number that is the partial result, up to 31
ranks without a gradient and up to 20 with one. An entry that is added travels once to each rank. Values of a width E
of their own count E·e wherever these are a result's or a value's bytes, and winners then bring their keys always.

Equal keys on different ranks come older first if a backend gives them equal scores, that is, if it rounds a score alike
wherever the key stands, as `native` does. Plain matrix products round by place: such keys may change places.

Shapes: the letters of `memtrans_kernels`, and W ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from memtrans.local_keys import LocalKeys, seed_of
from memtrans.memory.exchange import by_rank, exchange, from_all, side_by_side
from memtrans.memory.ids import NOTHING, check_kept
from memtrans.memory.parts import Asking, Weighing
from memtrans.memory.snapshot import MemorySnapshot
from memtrans_kernels import knn_merge, knn_search, memory_attention, merge_attention
from memtrans_kernels.backends import implements

if TYPE_CHECKING:  # it imports this module
    from memtrans.memory.sharded_ring import ShardedRing


@dataclass(frozen=True)
class Neighbours:
    """What a search found: for the queries of this rank, and on this rank for the queries of all.

    Attributes:
        scores: (B, H, N, K), of this rank's queries, best first, then -inf.
        entries: (B, H, N, K) int64, the numbers of the neighbours, then -1.
        places: (W, B, H, N, K) int32, which neighbour each candidate of each rank became; K where it became none.
        queries: (B, H, W·N, D), those of all ranks; differentiable.
        candidate_scores: (B, H, W·N, K), of the best keys that this rank holds for the queries of all ranks.
        candidates: (B, H, W·N, K) int32, the slots of those keys.
    """

    scores: Tensor
    entries: Tensor
    places: Tensor
    queries: Tensor
    candidate_scores: Tensor
    candidates: Tensor


@dataclass(frozen=True)
class ShardedSnapshot(MemorySnapshot):
    """A sharded memory as one forward pass sees it; `start` and `cursor` count entries on all ranks."""

    ring: ShardedRing

    def live(self) -> MemorySnapshot:
        """See `MemorySnapshot.live`."""
        return replace(super().live(), cursor=self.ring.total)

    def find(self, query: Tensor, k: int, query_mask: Tensor | None = None) -> Neighbours:
        """Finds the K nearest entries of query (B, H, N, D) on all ranks, and this rank's candidates for all others.

        query_mask: (B, N) bool, False for queries that see none. Default: all see theirs.
        """
        ring, ranks = self.ring, self.ring.ranks
        self.check_current()
        queries = side_by_side(from_all(query, ranks))
        first = ring.own(torch.maximum(self.start, self.cursor - ring.most))
        own_scores, slots = knn_search(
            queries, self.keys, self.rows, first, ring.own(self.cursor), ring.capacity, k, backend=ring.backend
        )
        scores, theirs = (exchange(by_rank(tensor, ranks.size), ranks) for tensor in (own_scores, slots))
        backend = ring.backend if implements("knn_merge", ring.backend) else "auto"
        scores, entries, places = knn_merge(scores, theirs, self.rows, self.cursor, self.keys.shape[1], backend=backend)
        if query_mask is not None:
            hidden = ~query_mask[:, None, :, None]
            scores, entries = scores.masked_fill(hidden, -torch.inf), entries.masked_fill(hidden, -1)
            places = places.masked_fill(hidden, k)
        return Neighbours(scores, entries, places, queries, own_scores, slots)

    def won(self, found: Neighbours) -> Tensor:
        """Which of this rank's candidates became neighbours: (B, H, W·N, K) bool. Asks all ranks."""
        answers = (found.places < found.scores.shape[-1]).to(torch.uint8)
        return side_by_side(exchange(answers, self.ring.ranks)).bool()

    def nearest(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores and numbers of entries, (B, H, N, K) each; a slot would say nothing without its rank."""
        found = self.find(query, k)
        return found.scores, found.entries

    def ids_of(self, slots: Tensor) -> Tensor:
        """The ids of entries (B, H, ...) that `nearest` found; asks the ranks that hold them."""
        ranks, kept = self.ring.ranks, check_kept(self.ids)
        asked = from_all(slots.long(), ranks)  # (W, B, H, ...)
        mine = (asked >= 0) & (asked % ranks.size == ranks.rank)
        own = torch.where(mine, asked // ranks.size % kept.shape[1], NOTHING)
        answers = torch.stack([super(ShardedSnapshot, self).ids_of(part) for part in own])
        answers = exchange(torch.where(mine, answers, 0), ranks).sum(dim=0)
        return torch.where(slots >= 0, answers, NOTHING)

    def pairs(self, query: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `MemorySnapshot.pairs`; numbers of entries stand for slots.

        The host waits for the device once, to learn how much each rank sends.
        """
        keys, values, scores, entries = self.found(query, k)
        return torch.stack((keys, values), dim=-2), scores, entries  # zeros where there is none

    def found(self, query: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `MemorySnapshot.found`, and `pairs`."""
        found = self.find(query, k)
        keys, values = self.fetch(found, [self.keys, self.values])
        return keys.to(query.dtype), values.to(query.dtype), found.scores, found.entries

    def fetch(self, found: Neighbours, rings: Sequence[Tensor]) -> list[Tensor]:
        """Fetches the neighbours' keys or values from the ranks that hold them: (B, H, N, K, D or E) for each of
        `rings`.

        rings: `self.keys` (R, slots, D) or `self.values` (R, slots, E). Where there is no neighbour the result is zero.
        """
        ranks = self.ring.ranks
        won, slots = (by_rank(tensor, ranks.size) for tensor in (self.won(found), found.candidates))
        row = self.of_heads(torch.arange(self.start.shape[0], device=slots.device), slots.shape[2])
        row, slot = row[:, :, None, None].expand_as(slots)[won], slots[won].long()
        mine = found.places < found.scores.shape[-1]
        sent, received = ([int(n) for n in mask.flatten(1).sum(dim=1).tolist()] for mask in (won, mine))
        index = mine.nonzero(as_tuple=True)
        fetched = []
        for ring in rings:
            got = ring.new_empty(sum(received), ring.shape[2])
            with ranks.listening():
                dist.all_to_all_single(got, ring[row, slot], received, sent, group=ranks.quick)
            whole = ring.new_zeros(*found.scores.shape, ring.shape[2])
            whole[(*index[1:4], found.places[mine].long())] = got
            fetched.append(whole)
        return fetched

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
        """See `MemorySnapshot.attend`. The neighbours are on several ranks: one softmax is merged from two parts.

        Raises ValueError where all entries are asked for.
        """
        if k is None:
            number = self.ring.ranks.size
            raise ValueError(f"attend_to must be 'neighbours' with a memory spread over {number} ranks, got 'all'")
        weighing = Weighing(scale, memory_offset, memory_gate, dropout_p, asking)
        return self.attend_in_parts(query, k, local, weighing)

    def entries_in(self, slots: Tensor) -> Tensor:
        """What `nearest` gives here are numbers of entries."""
        return slots

    def attend_to_retrieved(
        self,
        query: Tensor,
        k: int,
        scale: Tensor,
        dropout_p: float = 0.0,
        query_mask: Tensor | None = None,
        soft_cap: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `MemorySnapshot.attend_to_retrieved`.

        The winners travel, or the partial results: what is fewer bytes; the module has the count.
        """
        found = self.find(query, k, query_mask)
        options = {"dropout_p": dropout_p, "seed": seed_of(dropout_p, query.device), "soft_cap": soft_cap}
        learning, number = torch.is_grad_enabled(), query.element_size()
        result = self.values.shape[2] * number + 4
        part = 2 * result + query.shape[-1] * number if learning else result
        winner = sum(ring.shape[2] * ring.element_size() for ring in self._rings_to_fetch())
        if self.ring.ranks.size * part <= k * winner:
            out, lse = self._attend_in_parts(found, scale, options)
        else:
            out, lse = self._attend_to_fetched(query, found, scale, options)
        return out, lse, found.scores, found.entries

    def _attend_in_parts(self, found: Neighbours, scale: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Each rank attends, for the queries of all, to the neighbours that it holds; who asked merges the parts.

        A query is multiplied by the scale of the rank that asked, so that the gradient of the scale goes there too.
        """
        ranks = self.ring.ranks
        length = found.queries.shape[2] // ranks.size
        scales = from_all(scale, ranks).T.repeat_interleave(length, dim=1)[None, :, :, None]  # (1, H, W·N, 1)
        queries = (found.queries * scales).to(found.queries.dtype)
        out, lse = memory_attention(
            queries, *self.no_local_keys(queries.detach()), self.keys, self.values, self.rows,
            found.candidate_scores * scales.detach(), torch.where(self.won(found), found.candidates, -1),
            torch.ones_like(scale), **options, ledger=self.ledger,
        )  # fmt: skip
        outs, lses = (exchange(by_rank(part, ranks.size), ranks) for part in (out, lse))
        return merge_attention(outs, lses)

    def _attend_to_fetched(
        self, query: Tensor, found: Neighbours, scale: Tensor, options: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Fetches the winners and attends to them as to a memory of N·K entries for each head.

        The scores are known, so the keys are fetched for the gradient alone; without one, values of their width stand
        for them.
        """
        fetched = [ring.flatten(2, 3).flatten(0, 1) for ring in self.fetch(found, self._rings_to_fetch())]
        keys, values = fetched[0], fetched[-1]
        slots = torch.arange(keys.shape[1], dtype=torch.int32, device=keys.device).reshape(found.scores.shape[2:])
        no_key, no_value = (query.new_empty(*query.shape[:2], 0, ring.shape[-1]) for ring in (keys, values))
        return memory_attention(
            query, no_key, no_value, keys, values, torch.arange(keys.shape[0], device=keys.device),
            found.scores, torch.where(found.entries >= 0, slots, -1), scale, **options,
        )  # fmt: skip

    def _rings_to_fetch(self) -> list[Tensor]:
        """What of the neighbours travels, see `_attend_to_fetched`."""
        needs_keys = torch.is_grad_enabled() or self.keys.shape[2] != self.values.shape[2]
        return [self.keys, self.values] if needs_keys else [self.values]

    # ------------------------------------------------------------------------------------------------------ add, clear

    def append(
        self, keys: Tensor, values: Tensor, count: Tensor | None = None, ids: Tensor | None = None
    ) -> MemorySnapshot:
        """Stores the keys and values of all ranks, in the order of the ranks; returns the state after that.

        Args:
            keys, values: (B, G, N, D) and (B, G, N, E), this rank's. All ranks give the same N.
            count: (B,) int64, how many of this rank's N each document stores. Default: all.
            ids: (B, N) int64, this rank's, where ids are kept. Default: positions in the document.
        """
        ring, ranks = self.ring, self.ring.ranks
        batch, groups, length, _ = keys.shape
        ring.clearings.note_segment()
        if length == 0:
            return self
        ticket, again = self.advance(length)
        if count is None:
            count = torch.full((batch,), length, dtype=torch.int64, device=keys.device)
        ends = from_all(count, ranks).cumsum(dim=0).repeat_interleave(groups, dim=1).T.contiguous()  # (B·G, W)
        added, cursor = ends[:, -1], self.cursor[self.rows]
        first = (ranks.rank - cursor) % ranks.size  # of the new entries of a row, the first on this rank
        offset = first[:, None] + ranks.size * torch.arange(length, device=keys.device)  # (B·G, N)
        source = torch.searchsorted(ends, offset, right=True).clamp(max=ranks.size - 1)
        before = torch.cat((torch.zeros_like(added[:, None]), ends), dim=1).gather(1, source)
        place = (source * length + (offset - before)).clamp(max=ranks.size * length - 1)
        index = place.reshape(batch, groups, length, 1)
        keys, values = (
            side_by_side(from_all(new.detach(), ranks)).gather(2, index.expand_as(new)) for new in (keys, values)
        )
        here = (added - first + ranks.size - 1).div(ranks.size, rounding_mode="floor").clamp(min=0)
        if not again:
            at = ring.own(self.cursor)
            ring.add(self.rows, keys, values, self._new_ids(ids, place, cursor[:, None] + offset), count=here, at=at)
        after = self.cursor.index_add(0, self.rows, added)
        ring.total.copy_(torch.maximum(ring.total, after))  # a recomputed forward adds nothing
        return replace(self.behind(after, ticket, again), cleared_elsewhere=None)

    def _new_ids(self, ids: Tensor | None, place: Tensor, entry: Tensor) -> Tensor | None:
        """The ids (B·G, N) of entries that this rank stores: those given (B, N) to all ranks, or positions.

        place, entry: (B·G, N), where they are among the N of all ranks, one rank behind the other, and their numbers.
        """
        if self.origin is None:
            return None
        if ids is None:
            return entry - self.origin[self.rows][:, None]
        of_all = from_all(ids, self.ring.ranks).movedim(0, 1).flatten(1)  # (B, W·N)
        return of_all.repeat_interleave(place.shape[0] // ids.shape[0], dim=0).gather(1, place)

    def cleared(self, mask: Tensor) -> MemorySnapshot:
        """Forgets the documents where mask (B,) is True on one rank at least; returns the state after that."""
        ranks = self.ring.ranks
        of_all = from_all(mask.to(torch.uint8), ranks).bool()  # (W, B)
        elsewhere = of_all[: ranks.rank].any(dim=0), of_all[ranks.rank + 1 :].any(dim=0)
        return replace(super().cleared(of_all.any(dim=0)), cleared_elsewhere=elsewhere)
