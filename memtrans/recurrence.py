"""What a model takes from the segments before and leaves to the next one: XL caches, and documents that begin and end.

Rows begin, end and are padded at different places, so each says how much of a cache is its own document. Shapes: B
documents, N tokens of the segment, G key/value heads, X cached XL tokens, D head width. Source: the segment-level
recurrence of Dai et al. 2019 (Transformer-XL, arXiv 1901.02860).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memtrans.checks import check_count, check_tokens
from memtrans.memory.clearings import check_known, length_seen
from memtrans.memory.snapshot import MemorySnapshot
from memtrans.segments import Segment, beginnings, mask_of
from memtrans.xl_memories import (
    XLMemories,
    caches_of,
    check_caches,
    check_said,
    length_after,
    length_found,
    length_of,
    mark,
)


class Recurrence:
    """What a model does with its XL caches and its start and end tokens; `forward` of the model says what they mean."""

    xl_memory_layers: tuple[int, ...]
    kv_heads: int
    dim_head: int
    value_dim_head: int
    clear_memories_on_sos_token_id: int | None
    clear_memories_on_eos_token_id: int | None
    causal: bool
    legacy: bool
    validate: bool

    # ------------------------------------------------------------------------------------------------- XL caches

    def _caches_given(
        self,
        xl_memories: Sequence[Tensor | None] | None,
        xl_length: Tensor | None,
        batch: int,
        device: torch.device,
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """The XL cache of each caching layer, None where none is yet, and `xl_length` (B,), or what the caches say.

        Raises unless there is one for each of the layers, and each is (B, X, 2, D), or (B, G, X, 2, D) if G > 1.
        """
        caches = caches_of(xl_memories, self.xl_memory_layers)
        if not torch.compiler.is_compiling():
            check_caches(caches, batch, self.kv_heads, (self.dim_head, self.value_dim_head), device)
        return caches, length_of(xl_memories) if xl_length is None else xl_length

    def _check_segment(
        self,
        batch: int,
        length: int,
        device: torch.device,
        caches: Sequence[Tensor | None],
        lengths: Tensor | None,
        xl_length: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        """Raises unless counts and a mask fit a segment (B, N), and caches are full or say how much of them is."""
        check_count("lengths", lengths, batch, device, length)
        check_count("xl_length", xl_length, batch, device)
        if mask is not None:
            check_tokens("mask", mask, batch, length, device)
        real = mask_of(mask, lengths, length, self.causal)
        check_said(caches, lengths if real is None else real.sum(dim=1), xl_length, self.validate)

    def _cached_seen(
        self, caches: Sequence[Tensor | None], xl_length: Tensor | None, snapshots: Sequence[MemorySnapshot]
    ) -> Tensor | None:
        """How many of the newest cached tokens each row sees (B,); None for all. A row that a memory forgot sees none.

        Raises ValueError where nobody says whether caches are older than what the memories forgot.
        """
        if self.legacy:
            return length_found(caches, xl_length)
        if not torch.compiler.is_compiling():
            check_known(caches, xl_length, snapshots)
        return length_seen(caches, length_found(caches, xl_length), snapshots)

    def _caches_left(
        self,
        new_caches: list[Tensor],
        caches: Sequence[Tensor | None],
        segment: Segment,
        xl_length: Tensor | None,
        added_to: Sequence[MemorySnapshot],
    ) -> list[Tensor]:
        """The new XL caches, which say how much of them is each row's document, and when they were made.

        Args:
            new_caches: of the caching layers, as they left them.
            caches, xl_length: before the segment.
            added_to: the memories of the segment.
        """
        if "forward" in self.__dict__:  # accelerate's, which makes float32 copies of all else, and they say nothing
            new_caches = [cache.float() for cache in new_caches]
        held = length_after(caches, segment, xl_length)  # (B,)
        clearings = tuple(snapshot.clearings for snapshot in added_to)  # of each memory (B·G,)
        if held is None:
            mark(new_caches, None, clearings)
            return new_caches
        return XLMemories(new_caches, held.clamp(max=new_caches[0].shape[-3]), clearings)

    # ------------------------------------------------------------------------------------- start and end tokens

    @property
    def _clears_on_tokens(self) -> bool:
        """Whether there is a start or an end token."""
        return self.clear_memories_on_sos_token_id is not None or self.clear_memories_on_eos_token_id is not None

    def _begin_documents(
        self, ids: Tensor, segment: Segment, snapshots: list[MemorySnapshot], add_knn_memory: bool
    ) -> tuple[Segment, list[MemorySnapshot], list[MemorySnapshot]]:
        """Lets documents begin where ids (B, N) say so; memories that are only read keep what they hold.

        With `legacy` a start token clears its row's memory before the segment, inside which no document begins.

        Returns:
            the segment with its beginnings, the memories to search and those to add to.
        """
        start, end = self.clear_memories_on_sos_token_id, self.clear_memories_on_eos_token_id
        if self.legacy:
            searched = _without(start, snapshots, ids, segment) if add_knn_memory else snapshots
            return segment, searched, searched
        begun, added_to = beginnings(ids, start, end, segment.real), snapshots
        if add_knn_memory:
            added_to = [snapshot.cleared(begun.left >= 0) for snapshot in snapshots]
            elsewhere = added_to[0].cleared_elsewhere if added_to else None
            begun = begun if elsewhere is None else begun.beside(*elsewhere)
        return segment._replace(beginnings=begun), snapshots, added_to

    def _end_documents(self, ids: Tensor, segment: Segment, stored: list[MemorySnapshot]) -> None:
        """As `legacy` has it, clears behind a segment the memories, which `stored` it, of rows with an end token."""
        _without(self.clear_memories_on_eos_token_id, stored, ids, segment)


def _without(
    token_id: int | None, snapshots: list[MemorySnapshot], ids: Tensor, segment: Segment
) -> list[MemorySnapshot]:
    """The memories without the documents whose row of ids (B, N) has the token outside padding; on the device."""
    if token_id is None:
        return snapshots
    found, real = ids == token_id, segment.real  # (B, N)
    mask = (found if real is None else found & real).any(dim=-1)  # (B,)
    return [snapshot.cleared(mask) for snapshot in snapshots]
