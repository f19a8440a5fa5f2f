"""Attention to all that a memory holds, instead of to the nearest entries: for memories that are small.

Up to some thousand entries it is cheaper to attend to all of them than to search. What is seen is what a search may
find: the entries [max(start, cursor - M), cursor) of a snapshot whose keys are finite. Where nothing is learned a
kernel of its own reads the ring where it lies; otherwise the one for local keys does, hidden slots among the others,
with a mask over slots.

Shapes: the letters of `memtrans_kernels`; T = M + S slots of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memtrans.local_keys import LocalKeys, seed_of
from memtrans.memory.parts import Weighing, attend_to_local, mixed
from memtrans_kernels import memory_attention, whole_attention
from memtrans_kernels.backends import ATTENTION_MOST
from memtrans_kernels.eager import is_differentiated_by_transform

if TYPE_CHECKING:
    from memtrans.memory.snapshot import MemorySnapshot

FAR_BELOW = -1e30  # an lse that weighs nothing beside any other
MANY = 64  # queries of a head from which on a block of them is worth a kernel of its own
TILE = 16  # queries of a head from which on a cast of the memory is read often enough to be made


def attend_to_whole(snapshot: MemorySnapshot, query: Tensor, local: LocalKeys, weighing: Weighing) -> Tensor:
    """Attention of query (B, H, N, D) to all entries that it may see and to the local keys: (B, H, N, E).

    Raises RuntimeError where somebody traces the memory.
    """
    if snapshot.ring.watch.looks:
        raise RuntimeError("attend_to must be 'neighbours' in a layer that is traced: all entries are no citation")
    scale, memory_offset, memory_gate, dropout_p, asking = weighing
    to_local, local_lse = attend_to_local(query, local, scale, dropout_p)
    if asking is not None:
        query, scale = asking
    plain = dropout_p == 0.0 and local.query_mask is None and local.soft_cap is None
    if plain and memory_gate is None and has_kernel(snapshot, query, scale, to_local, memory_offset):
        return attend_at_once(snapshot, query, scale, to_local, local_lse, memory_offset)[0]
    to_memory, memory_lse = attend_to_entries(snapshot, query, scale, dropout_p, local.query_mask, local.soft_cap)
    if memory_gate is not None:
        share = torch.where(memory_lse == -torch.inf, 0.0, memory_gate.sigmoid()[:, None])
        return mixed(to_memory, to_local, share)
    if memory_offset is not None:
        memory_lse = memory_lse + memory_offset[:, None]
    # what the joint softmax gives to the memory; a difference of infinities would be NaN, in the gradient too
    share = (memory_lse.clamp(min=FAR_BELOW) - local_lse.clamp(min=FAR_BELOW)).sigmoid()
    return mixed(to_memory, to_local, share)


def attend_to_entries(
    snapshot: MemorySnapshot,
    query: Tensor,
    scale: Tensor,
    dropout_p: float = 0.0,
    query_mask: Tensor | None = None,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of query (B, H, N, D) to all entries that it may see, with logits scale[h] · <query, key>.

    Args:
        snapshot: of a memory of this process alone.
        scale: (H,). dropout_p: probability of dropping a weight.
        query_mask: (B, N) bool, False for queries that see none. Default: all see theirs.
        soft_cap: what bounds a logit. Default: nothing.

    Returns out (B, H, N, E) and lse (B, H, N), differentiable in query and scale; zeros and -inf for a query that sees
    no entry. Raises StaleMemoryError where more than `spare` entries were added since, from the backward pass too.
    """
    plain = dropout_p == 0.0 and query_mask is None and soft_cap is None
    if plain and has_kernel(snapshot, query, scale):
        return attend_at_once(snapshot, query, scale)
    snapshot.check_current()
    learning = torch.is_grad_enabled() and (query.requires_grad or scale.requires_grad)
    keys, values, seen = entries_seen(snapshot, query, learning)
    slots, parts = keys.shape[2], []
    no_keys, no_values = (query.new_empty(1, 1, ring.shape[3]) for ring in (keys, values))
    for place, part in enumerate(query.split(slots, dim=2)):  # a kernel takes no more queries than keys
        first = None
        if query_mask is not None:
            first = torch.where(query_mask[:, place * slots : (place + 1) * slots], 0, slots)
        scores = query.new_empty(*part.shape[:3], 0)
        result = memory_attention(
            part, keys, values, no_keys, no_values, torch.zeros_like(snapshot.rows), scores, scores.int(), scale,
            dropout_p=dropout_p, seed=seed_of(dropout_p, query.device), causal=False, key_mask=seen, first=first,
            soft_cap=soft_cap, ledger=snapshot.ledger,
        )  # fmt: skip
        parts.append(result)
    if len(parts) == 1:
        return parts[0]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def has_kernel(snapshot: MemorySnapshot, query: Tensor, *learned: Tensor | None) -> bool:
    """Whether `attend_at_once` is the fastest way: for many queries on a GPU.

    learned: what else a derivative may be wanted by.
    """
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (query, *learned)):
        return False
    if is_differentiated_by_transform(query, *learned):
        return False
    widest = max(snapshot.keys.shape[2], snapshot.values.shape[2])
    ring, one_group = snapshot.ring, snapshot.rows.numel() == snapshot.documents  # of several, one hides another's
    return (
        (query.is_cuda or ring.backend == "triton")
        and ring.backend in ("auto", "triton")
        and one_group
        and query.shape[2] >= MANY
        and widest <= ATTENTION_MOST
        and query.dtype in (torch.bfloat16, torch.float32)
    )


def attend_at_once(
    snapshot: MemorySnapshot,
    query: Tensor,
    scale: Tensor,
    to_local: Tensor | None = None,
    local_lse: Tensor | None = None,
    memory_offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend_to_entries`, in one softmax with the local part (B, H, N, E) and (B, H, N) where it is given.

    Nothing learns from it.
    """
    keys, values, rows, start, cursor = (
        snapshot.keys, snapshot.values, snapshot.rows, snapshot.start, snapshot.cursor
    )  # fmt: skip
    if rows.numel() < len(keys) and not query.dtype == keys.dtype == values.dtype:  # the others need no cast
        keys, values, start, cursor = (of_rows[rows] for of_rows in (keys, values, start, cursor))
        rows = torch.arange(rows.numel(), device=rows.device)
    keys, values = (ring.to(query.dtype) for ring in (keys, values))  # itself where it is of that one
    return whole_attention(
        query, keys, values, rows, start, cursor, snapshot.ring.capacity, scale, to_local, local_lse, memory_offset,
        ledger=snapshot.ledger, backend=snapshot.ring.backend,
    )  # fmt: skip


def entries_seen(snapshot: MemorySnapshot, query: Tensor, learning: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (B, G, T, D), values (B, G, T, E) and which of them are seen (B, T) bool.

    Of several groups, an entry is seen if the keys of all of them are finite. Not copied unless rows are chosen, many
    queries are of another dtype, or a backward pass follows: that one multiplies what is not seen by 0, so it must be
    finite.
    """
    keys, values = (_of_documents(snapshot, ring) for ring in (snapshot.keys, snapshot.values))
    finite = torch.linalg.vector_norm(keys.detach(), ord=torch.inf, dim=-1).isfinite()  # (B, G, T), in one pass
    seen = _visible(snapshot) & finite.all(dim=1)
    if learning:
        hidden = ~seen[:, None, :, None]
        keys, values = (ring.masked_fill(hidden, 0.0) for ring in (keys, values))
    if query.shape[2] >= TILE:
        keys, values = keys.to(query.dtype), values.to(query.dtype)
    return keys, values, seen


def _of_documents(snapshot: MemorySnapshot, ring: Tensor) -> Tensor:
    """The rows in scope of a ring (R, T, width) as (B, G, T, width); the ring itself where they are all, in order."""
    chosen = ring if snapshot.in_order else ring[snapshot.rows]
    return chosen.reshape(snapshot.documents, -1, *ring.shape[1:])


def _visible(snapshot: MemorySnapshot) -> Tensor:
    """Which slots hold an entry that a search may find (B, T); the rows of a document hold the same entries."""
    first_rows = snapshot.rows.reshape(snapshot.documents, -1)[:, 0]
    start, cursor = (count[first_rows][:, None] for count in (snapshot.start.clamp(min=0), snapshot.cursor))  # (B, 1)
    slots, newest = snapshot.keys.shape[1], cursor - 1
    entry = newest - (newest - torch.arange(slots, device=cursor.device)) % slots  # the newest that went there
    return (entry >= start) & (entry >= cursor - snapshot.ring.capacity)
