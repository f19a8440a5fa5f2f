"""The memory of a Memorizing Transformer: what a document said so far, behind upstream's interface.

`KNNMemory` owns one layer's ring (`ring.py`, or `sharded.py`) and knows its scope, formats and files. The search itself
is an operator of `memtrans_kernels`. Source: Wu et al. 2022, sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from memtrans.checks import check_finite
from memtrans.compatibility import UNUSED, warn_unused
from memtrans.memory.checks import (
    are_several,
    check_ids,
    check_keys_and_values,
    check_mask,
    check_memories,
    check_no_recomputation,
    check_numbers,
    check_one_width,
    check_queries,
    check_removal,
    check_slots,
    document_numbers,
)
from memtrans.memory.entries import Entries, entries_of, no_entries
from memtrans.memory.ids import check_kept
from memtrans.memory.saved import SavedMemory
from memtrans_kernels import checks


class KNNMemory(SavedMemory):
    """A first-in, first-out memory of (key, value) pairs for each document of a batch, searched exactly.

    Args:
        dim: D, width of keys, and of values unless they have one of their own.
        max_memories: M, entries visible per document; the oldest are dropped.
        num_indices: documents in the batch, B.
        memmap_filename: accepted and ignored, with a DeprecationWarning.
        multiprocessing: accepted and ignored, with a DeprecationWarning.
        device: where the memory lives. Default: that of the first tensor it sees.
        dtype: of keys (and values): float32, float16, bfloat16 or float64. Default: float32 on the CPU, float16 on
            CUDA.
        value_dtype: of values. Default: `dtype`.
        kv_heads: G, key/value heads with a memory of their own each.
        spare: S, entries that may be added between a forward pass and its backward. It grows to the longest segment
            added; give N times the number of segments when several come before one backward. In eager mode the ring
            doubles, with a warning, for a backward pass that would come too late, up to 8 times its first size;
            "grow" is 0 with no such limit. A sharded memory, compiled and captured steps raise StaleMemoryError
            instead, which names the number that is enough.
        backend: of search: one of `auto`, `reference`, `triton`, `native`, `faiss`.
        process_group: ranks that hold this memory together, each a share of every document's entries; M is of all of
            them, so it grows with their number. Each rank reads a segment of its own of the same documents; what one
            does with the memory all do, with the same sizes; see `memtrans.memory.sharded`. Default: this process.
        keep_ids: keep an int64 id beside each entry: see `add` and `ids_of`. Default: False, at no cost.
        value_dim: E, width of values. Default: `dim`. With another one, what is a tensor of pairs (..., 2, D) else is a
            tuple of keys (..., D) and values (..., E), in `add` and in what `search` returns.

    A search of a sharded memory costs what it costs to search M / W entries for the queries of all W ranks. From each
    of the others a rank receives, for one query, D·e + 8·K + K bytes to search, and D·e + 4 to attend or D·e·K / W
    to fetch the winners' values, with e bytes a number; `memtrans.memory.sharded` has what a gradient adds.

    Attributes:
        scoped_indices: the documents that `add` and `search` speak of.
        shape: (num_indices, max_memories, 2, dim), with kv_heads after num_indices if there are several; with values of
            another width dim + value_dim instead of the last two.
        made_in: the number of the backward pass in which the memory was made; -1 outside of one.
        watch: who watches what is retrieved; see `KNNMemoryList.tracing`.

    Raises:
        ValueError, TypeError: a size that is no integer or below 1, another dtype, a device that this torch cannot use
            or that keeps no values (meta), an unknown backend; of a process group, ranks that differ in their arguments
            or kind of device, when they first use the memory.

    >>> memory = KNNMemory(dim=2, max_memories=3, num_indices=1)
    >>> memory.add(torch.tensor([[[[1.0, 0.0], [5.0, 5.0]], [[0.0, 1.0], [7.0, 7.0]]]]))   # (B, N, 2, D)
    >>> key_values, mask = memory.search(torch.tensor([[[0.0, 2.0]]]), topk=1)             # (B, ..., D)
    >>> key_values.tolist(), mask.tolist()
    ([[[[[0.0, 1.0], [7.0, 7.0]]]]], [[[True]]])
    """

    # ------------------------------------------------------------------------------------- add, search, clear

    def add(
        self, memories: Tensor | Sequence[Tensor], count: Tensor | None = None, *, ids: Tensor | None = None
    ) -> None:
        """Stores key/value pairs, as they are; the oldest ones make room.

        Args:
            memories: (B, N, 2, D), or (B, G, N, 2, D) when kv_heads > 1; key first, then value. Or keys (B, N, D) and
                values (B, N, E), in a tuple, likewise. Never differentiated.
            count: (B,) int64, store only the first so many of each document.
            ids: (B, N) int64, with keep_ids. Default: how many entries the document was given before each.

        Raises:
            ValueError, TypeError: another shape, dtype or device; on the CPU also values that are NaN; ids without
            keep_ids.

        >>> memory = KNNMemory(dim=2, value_dim=1, max_memories=3)
        >>> memory.add((torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[5.0], [7.0]]])))
        >>> (keys, values), mask = memory.search(torch.tensor([[0.0, 2.0]]), topk=1)
        >>> keys.tolist(), values.tolist(), mask.tolist()
        ([[[0.0, 1.0]]], [[[7.0]]], [[True]])
        """
        checks.typed(torch.int64, count=count)
        keys, values = (tensor.detach() for tensor in self._entries_given(memories))  # (B, G, N, D), (B, G, N, E)
        if ids is not None:
            check_ids(ids, keys, self.keep_ids)
        # infinite values saturate, and such keys are never retrieved
        check_numbers("the values in memories", values)
        self.snapshot(like=keys, longest=keys.shape[2]).append(keys, values, count, ids)

    def _entries_given(self, memories: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Keys (B, G, N, D) and values (B, G, N, E) of what `add` is given, which is checked."""
        batch, widths = len(self.scoped_indices), (self.dim, self.value_dim)
        if isinstance(memories, Sequence):
            check_keys_and_values(memories, batch, self.kv_heads, widths)
            keys, values = memories
        else:
            checks.tensors(memories=memories)
            checks.floating(memories=memories)
            check_one_width("memories", *widths)
            check_memories(memories, batch, self.kv_heads, self.dim)
            keys, values = memories.unbind(dim=-2)
        return (keys[:, None], values[:, None]) if self.kv_heads == 1 else (keys, values)

    def search(
        self,
        queries: Tensor,
        topk: int,
        nprobe: Any = UNUSED,
        increment_hits: Any = UNUSED,
        increment_age: Any = UNUSED,
        *,
        return_slots: bool = False,
        return_scores: bool = False,
    ) -> tuple[Any, ...]:
        """Finds the nearest keys of each query, best first.

        Args:
            queries: (B, ..., D); when kv_heads > 1 the axis after B is the query heads, a multiple of kv_heads.
            topk: K. Where a document holds fewer, the rest is zeros with a False mask.
            nprobe, increment_hits, increment_age: accepted and ignored, with a DeprecationWarning.
            return_slots: also return where the entries are, for `ids_of`; of a sharded memory their numbers.
            return_scores: also return the inner products.

        Returns:
            key_values (B, ..., K, 2, D) in the queries' dtype, or keys (B, ..., K, D) and values (B, ..., K, E) where
            they differ in width, and mask (B, ..., K); then, if asked for, slots (B, ..., K), -1 where there is none,
            and scores (B, ..., K) float32 (float64 for float64 keys), -inf where there is none.

        Raises:
            ValueError, TypeError: another shape, dtype or device, or a topk that is no integer of at least 1; on the
            CPU also queries that are not finite.
        """
        warn_unused(nprobe=nprobe, increment_hits=increment_hits, increment_age=increment_age)
        checks.tensors(queries=queries)
        checks.floating(queries=queries)
        topk = checks.integer("topk", topk, low=1)
        batch = len(self.scoped_indices)
        check_queries(queries, batch, self.kv_heads, self.dim)
        check_finite("queries", queries)
        heads = 1 if self.kv_heads == 1 else queries.shape[1]
        flat = queries.detach().reshape(batch, heads, -1, self.dim)
        snapshot, shape = self.snapshot(like=queries), (*queries.shape[:-1], topk)
        key_values: Tensor | tuple[Tensor, Tensor]
        if self.value_dim == self.dim:
            pairs, scores, slots = snapshot.pairs(flat, topk)
            key_values = pairs.reshape(*shape, 2, self.dim)
        else:
            keys, values, scores, slots = snapshot.found(flat, topk)
            key_values = keys.reshape(*shape, self.dim), values.reshape(*shape, self.value_dim)
        scores, slots = scores.reshape(shape), slots.reshape(shape)
        asked = [*([slots] if return_slots else []), *([scores] if return_scores else [])]
        return key_values, slots >= 0, *asked

    def ids_of(self, slots: Tensor) -> Tensor:
        """The ids of entries that a search found, as long as nothing was added, cleared or removed since.

        slots: (B, ..., K), from `search(..., return_slots=True)`; -1 where there is none.

        Returns ids (B, ..., K) int64, -1 where there is none.

        Raises ValueError without keep_ids, for another batch, or on the CPU for slots that there are not.

        >>> memory = KNNMemory(dim=1, max_memories=2, keep_ids=True)
        >>> memory.add(torch.tensor([[[[1.0], [0.0]], [[3.0], [0.0]], [[2.0], [0.0]]]]))
        >>> _, _, slots = memory.search(torch.ones(1, 1), topk=3, return_slots=True)
        >>> memory.ids_of(slots).tolist()
        [[1, 2, -1]]
        """
        ring = self._ring if self._ranks is None else None  # of a sharded memory they are numbers of entries
        most = None if ring is None else ring.keys.shape[1] - 1
        check_slots(slots, len(self.scoped_indices), self.kv_heads, most)
        if not self.keep_ids:
            check_kept(None)
        of_heads = slots.unsqueeze(1) if self.kv_heads == 1 else slots  # (B, H, ...)
        return self.snapshot(like=slots).ids_of(of_heads).reshape(slots.shape)

    def entries(self) -> Entries:
        """Copies of all that the documents in scope hold, old to new: keys, values, mask and ids, by these names.

        keys are (B, M, D), values (B, M, E), with G behind B when kv_heads > 1; mask is (B, M) bool, True in the first
        `lengths` places of each document; ids are (B, M) int64, or None without keep_ids.

        >>> memory = KNNMemory(dim=1, max_memories=3, keep_ids=True)
        >>> memory.add(torch.tensor([[[[1.0], [5.0]], [[2.0], [6.0]]]]))
        >>> entries = memory.entries()
        >>> entries.values.flatten().tolist(), entries.mask.tolist(), entries.ids.tolist()
        ([5.0, 6.0, 0.0], [[True, True, False]], [[0, 1, -1]])
        """
        if self._ring is None:
            heads = () if self.kv_heads == 1 else (self.kv_heads,)
            shape = (len(self.scoped_indices), *heads, self.max_memories)
            dtypes = (self.dtype, self.value_dtype)
            return no_entries(shape, (self.dim, self.value_dim), dtypes, self.keep_ids)
        snapshot = self.snapshot()
        return entries_of(self._ring, snapshot.rows, snapshot.documents)

    def expand(self, rows: int | Iterable[int]) -> KNNMemory:
        """A view of the documents in scope for many questions: beams, or several questions on one document.

        The view is to read alone. It finds what the memory holds whenever it is searched; nothing is copied. A model or
        layer reads it with add_knn_memory=False.

        rows: how many rows, a multiple of the documents in scope, of which neighbours read the same document; or for
        each row its document, counted among those in scope.

        Raises ValueError or TypeError for other rows.

        >>> memory = KNNMemory(dim=1, max_memories=3)
        >>> memory.add(torch.tensor([[[[1.0], [5.0]], [[2.0], [6.0]]]]))
        >>> key_values, _ = memory.expand(4).search(torch.tensor([[1.0], [-1.0], [2.0], [-2.0]]), topk=1)
        >>> key_values[:, 0, 1].flatten().tolist()
        [6.0, 5.0, 6.0, 5.0]
        """
        # a view is a memory, so its class stands on this one
        from memtrans.memory.expanded import ExpandedMemory, documents_of_rows

        return ExpandedMemory(self, documents_of_rows(rows, self.scoped_indices))

    def remove(self, mask: Tensor) -> None:
        """Removes entries: they are never retrieved again, and make room for others.

        mask: (B, M) bool, over `entries()` of the documents in scope; places that are not taken mean nothing. Of a
        sharded memory, what one rank removes is removed on all.

        The entries that stay are copied to new storage, so that a backward pass that is outstanding still reads what
        its forward pass retrieved; until then both are held. A snapshot of before still finds what is removed, and
        raises StaleMemoryError if something is added behind it.

        Raises ValueError or TypeError for another mask, RuntimeError where activation checkpointing runs a forward pass
        again.

        >>> memory = KNNMemory(dim=1, max_memories=3)
        >>> memory.add(torch.tensor([[[[1.0], [5.0]], [[2.0], [6.0]]]]))
        >>> memory.remove(memory.entries().values[..., 0] == 5.0)
        >>> memory.lengths.tolist(), memory.entries().values.flatten().tolist()
        ([1], [6.0, 0.0, 0.0])
        """
        check_removal(mask, len(self.scoped_indices), self.max_memories, self.device)
        if self._ring is not None:
            check_no_recomputation("the memory", self.made_in)
            self._ring.remove(self.snapshot().rows, self._host_rows(), mask.repeat_interleave(self.kv_heads, dim=0))

    def clear(self, batch_indices: int | Iterable[int] | None = None) -> None:
        """Forgets documents, counted absolutely even inside a scope; all of them by default.

        Another document begins then: what an XL cache that was made before holds of these rows is neither seen nor
        stored any more (but by models with `legacy=True`), in the layers of every model that reads with this memory.

        Raises ValueError or TypeError when one is repeated, out of range or no integer (a mask is for `clear_rows`).
        """
        if batch_indices is None:
            indices = list(range(self.num_indices))
        else:
            given: Any = batch_indices if are_several(batch_indices) else [batch_indices]
            indices = document_numbers("batch_indices", given, self.num_indices)
        if self._ring is not None:
            with self.at_batch_indices(range(self.num_indices)):
                mask = torch.zeros(self.num_indices, dtype=torch.bool, device="cpu")
                mask[indices] = True
                self.clear_rows(mask.to(self._ring.keys.device))
        else:
            self._count_cleared(indices)

    def clear_rows(self, mask: Tensor) -> None:
        """Forgets the documents in scope where mask (B,) bool, on the memory's device, is True, as `clear` does.

        No host round trip.
        """
        if self._ring is not None:
            self.snapshot().clear_rows(mask)
        else:
            check_mask(mask, len(self.scoped_indices))
            if self._cleared is not None:
                places = mask.nonzero()[:, 0].tolist()
                self._count_cleared([self.scoped_indices[place] for place in places])

    def cleanup(self) -> None:
        """Changes nothing, as upstream's; `clear()` empties, and storage goes with the last reference to the memory."""
