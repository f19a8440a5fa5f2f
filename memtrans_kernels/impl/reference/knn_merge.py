"""knn_merge in plain PyTorch: the oracle of all tests, and the last-resort kernel.

The K best of the W·K candidates of a query, by score, older entries first among equals. Entry i of a row is in share
i mod W, there as entry i // W of a ring of `size` slots.

    scores, slots (W, B, H, N, K) · rows (B·G,) · total (R,)
    -> scores, entries (B, H, N, K), places (W, B, H, N, K)

Source: Wu et al. 2022, section 3.2, for memories beyond one device. Works on CPU and CUDA tensors alike, without a host
round trip.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
