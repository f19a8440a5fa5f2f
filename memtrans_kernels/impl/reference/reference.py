"""What ring write, search, merge and cosine mean, in plain PyTorch: the oracle of all tests, the last-resort kernel.

Arithmetic is float32, or float64 where the inputs are (tests call it so); on CPU and CUDA tensors alike, without a host
round trip. Shapes in the letters of `memtrans_kernels`. What attention means stands in `reference_attention.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memtrans_kernels.precision import arithmetic_dtype

SEARCH_BLOCK_BYTES = 1 << 26  # of scores and their ranks held at once: 64 MiB


# ------------------------------------------------------------------------------------------------------ ring write


def saturate(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts; what is beyond the largest number of `dtype`, infinity too, becomes that number. NaN stays NaN."""
    limit = torch.finfo(dtype).max
    return tensor.to(dtype).clamp(-limit, limit)


def knn_add_(
    keys: Tensor,  # (R, M + S, D)
    values: Tensor,  # (R, M + S, D)
    cursor: Tensor,  # (R,)
    rows: Tensor,  # (B·G,)
    new_keys: Tensor,  # (B, G, N, D)
    new_values: Tensor,  # (B, G, N, D)
    count: Tensor | None = None,  # (B·G,)
    at: Tensor | None = None,  # (R,)
) -> None:
    """Entry base + j goes to slot (base + j) mod (M + S); what is stored already is left alone."""
    size, length = keys.shape[1], new_keys.shape[2]
    stored = cursor[rows]
    base = stored if at is None else at[rows]
    end = base + length if count is None else base + count

    window = min(length, size)  # consecutive entries, so no two of them share a slot
    entry = end[:, None] - window + torch.arange(window, device=keys.device)  # (B·G, window)
    fresh = (entry >= base[:, None]) & (entry >= stored[:, None])
    source = (entry - base[:, None]).clamp(min=0)
    slot = entry % size
    for ring, new, keep_infinite in ((keys, new_keys, True), (values, new_values, False)):
        new = new.flatten(0, 1).gather(1, source[..., None].expand(-1, -1, new.shape[-1]))
        cast = saturate(new, ring.dtype)
        if keep_infinite:  # an infinite key must stay one, so that it is never retrieved
            cast = torch.where(new.isinf(), new.to(ring.dtype), cast)
        ring[rows[:, None], slot] = torch.where(fresh[..., None], cast, ring[rows[:, None], slot])
    cursor[rows] = torch.maximum(stored, end)


# ---------------------------------------------------------------------------------------------------------- search


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


# ----------------------------------------------------------------------------------------------------------- merge


def knn_merge(
    scores: Tensor,  # (W, B, H, N, K)
    slots: Tensor,  # (W, B, H, N, K)
    rows: Tensor,  # (B·G,)
    total: Tensor,  # (R,)
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts all candidates of a query by age, then, keeping that order among equals, by score; they come in any."""
    shares, batch, heads, _, k = scores.shape
    share = torch.arange(shares, device=slots.device).reshape(-1, 1, 1, 1, 1)
    of_heads = total[rows].repeat_interleave(batch * heads // max(rows.numel(), 1)).reshape(batch, heads, 1, 1)
    newest = (of_heads - 1 - share) // shares  # (W, B, H, 1, 1), in its share
    entries = torch.where(slots >= 0, (newest - (newest - slots) % size) * shares + share, -1)

    all_scores, all_entries = (of_shares.movedim(0, -2).flatten(-2) for of_shares in (scores, entries))
    older = all_entries.masked_fill(all_entries < 0, torch.iinfo(torch.int64).max).argsort(dim=-1, stable=True)
    order = older.gather(-1, all_scores.gather(-1, older).argsort(dim=-1, descending=True, stable=True))
    ranking = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    places = torch.empty_like(order).scatter_(-1, order, ranking).unflatten(-1, (shares, k)).movedim(-2, 0)
    places = torch.where(entries >= 0, places.clamp(max=k), k).to(torch.int32).contiguous()
    best = order[..., :k]
    return all_scores.gather(-1, best), all_entries.gather(-1, best), places


# ---------------------------------------------------------------------------------------------------------- cosine


def cosine(query: Tensor, key: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """x / max(|x|, 1e-12) along D."""
    return _unit(query, dtype or query.dtype), _unit(key, dtype or key.dtype)


def _unit(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return F.normalize(tensor.to(arithmetic_dtype(tensor)), dim=-1, eps=1e-12).to(dtype).contiguous()


def cosine_backward(grad_query: Tensor, grad_key: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """(g - u <g, u>) / |x| with u = x / |x|."""
    return _unit_backward(grad_query, query), _unit_backward(grad_key, key)


def _unit_backward(grad: Tensor, tensor: Tensor) -> Tensor:
    wide = tensor.to(arithmetic_dtype(tensor))
    norm = wide.norm(dim=-1, keepdim=True)
    unit = wide / norm.clamp(min=1e-12)
    grad = grad.to(wide.dtype)
    along = (grad * unit).sum(dim=-1, keepdim=True)
    projected = grad - torch.where(norm > 1e-12, along, 0.0) * unit  # below 1e-12 the divisor is a constant
    return (projected / norm.clamp(min=1e-12)).to(tensor.dtype).contiguous()
