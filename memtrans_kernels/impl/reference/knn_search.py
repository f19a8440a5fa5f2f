"""knn_search in plain PyTorch: the oracle of all tests, and the last-resort kernel.

scores[b, h, n] = the K largest <query[b, h, n], key> over the visible keys of row rows[b·G + h // (H / G)], which are
the entries [max(start, cursor - M), cursor) without those that have a non-finite component.

    query (B, H, N, D) · keys (R, M + S, D) · rows (B·G,) · start, cursor (R,) -> scores, slots (B, H, N, K)

Source: Wu et al. 2022, section 3.1. Arithmetic is float32, or float64 where the keys are; on CPU and CUDA tensors
alike, without a host round trip.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memtrans_kernels.precision import arithmetic_dtype

SEARCH_BLOCK_BYTES = 1 << 26  # of scores and their ranks held at once: 64 MiB


def knn_search(
    query: Tensor,  # (B, H, N, D)
    keys: Tensor,  # (R, M + S, D)
    rows: Tensor,  # (B·G,)
    start: Tensor,  # (R,)
    cursor: Tensor,  # (R,)
    capacity: int,
    k: int,
) -> tuple[Tensor, Tensor]:
    """Scores every visible key and keeps the K best, older entries first among equals; in blocks of queries."""
    batch, heads, length, dim = query.shape
    groups = rows.numel() // max(batch, 1)
    dtype = arithmetic_dtype(keys)
    scores = torch.full((batch, heads, length, k), -torch.inf, dtype=dtype, device=query.device)
    slots = torch.full((batch, heads, length, k), -1, dtype=torch.int32, device=query.device)
    if scores.numel() == 0:
        return scores, slots
    block = max(1, SEARCH_BLOCK_BYTES // (16 * capacity))
    for b in range(batch):
        for g in range(groups):
            of_group = slice(g * heads // groups, (g + 1) * heads // groups)
            row = rows[b * groups + g, None]  # (1,): a number would make the host wait for it
            row_keys, row_slots, visible = _oldest_first(keys, row, start, cursor, capacity)
            row_query = query[b, of_group].reshape(-1, dim).to(keys.dtype).to(dtype)
            first, wide_keys = _first_equal(row_keys), row_keys.to(dtype)
            parts = [_best(part, wide_keys, first, visible, k) for part in row_query.split(block)]
            best, order = (torch.cat(part) for part in zip(*parts, strict=True))
            found = order >= 0
            row_slots = torch.where(found, row_slots[order.clamp(min=0)], -1).to(torch.int32)
            width = best.shape[-1]
            scores[b, of_group, :, :width] = best.reshape(-1, length, width)
            slots[b, of_group, :, :width] = row_slots.reshape(-1, length, width)
    return scores, slots


def knn_search_on_host(
    query: Tensor, keys: Tensor, rows: Tensor, start: Tensor, cursor: Tensor, capacity: int, k: int
) -> tuple[Tensor, Tensor]:
    """The same where looking at a length costs nothing: scores no more entries than the fullest row holds."""
    longest = int((cursor - start)[rows].max()) if rows.numel() else 0
    return knn_search(query, keys, rows, start, cursor, max(1, min(capacity, longest)), k)


def _oldest_first(
    keys: Tensor, row: Tensor, start: Tensor, cursor: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The last M entries of a row from old to new: keys (M, D), their slots (M,), and which are visible (M,)."""
    entry = cursor[row] - capacity + torch.arange(capacity, device=keys.device)
    slot = entry % keys.shape[1]
    row_keys = keys[row.expand_as(slot), slot]
    visible = (entry >= start[row].clamp(min=0)) & row_keys.isfinite().all(dim=-1)
    return row_keys, slot, visible


def _first_equal(row_keys: Tensor) -> Tensor:
    """For each key (M, D) the position of the oldest one equal to it (M,); no sizes that depend on the data."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[row_keys.element_size()]
    bits = (row_keys + 0.0).view(integers).long()  # + 0.0 makes -0.0 equal to 0.0
    factors = torch.full_like(bits[0], 6364136223846793005).cumprod(dim=0)  # Knuth's MMIX multiplier; int64 wraps
    hashes, order = (bits * factors).sum(dim=-1).sort(stable=True)
    position = torch.arange(len(order), device=order.device)
    changed = torch.ones_like(position, dtype=torch.bool)
    changed[1:] = hashes[1:] != hashes[:-1]
    of_run = order[torch.where(changed, position, 0).cummax(dim=0).values]
    first = torch.empty_like(order).scatter_(0, order, of_run)
    return torch.where((row_keys[first] == row_keys).all(dim=-1), first, position)  # two keys may share a hash


def _best(query: Tensor, row_keys: Tensor, first: Tensor, visible: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and positions (Q, min(K, M)) of the best keys; position -1 and score -inf where there is none.

    A matrix product rounds by where in it a column stands, so equal keys share the score of the first of them.
    """
    scores = (query @ row_keys.T).index_select(-1, first) + 0.0
    scores = scores.masked_fill(~visible | scores.isnan(), -torch.inf)
    k = min(k, scores.shape[-1])
    if scores.dtype == torch.float64:
        order = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
    else:
        order = (scores.shape[-1] - 1) - (_rank(scores).topk(k, dim=-1).values & 0xFFFFFFFF)
    best = scores.gather(-1, order)
    return best, order.masked_fill(best == -torch.inf, -1)


def _rank(scores: Tensor) -> Tensor:
    """One int64 per score whose order is (score, then age): topk has no order of its own among equal scores."""
    bits = scores.view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()  # integers in the order of the floats
    older = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    return (ordered << 32) | older
