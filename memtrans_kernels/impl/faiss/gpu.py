"""knn_search by Faiss on the GPU, through csrc/faiss: a rival to compare with.

scores[b, h, n] = the K largest <query[b, h, n], key> over the visible keys of row rows[b·G + h // (H / G)], Wu et al.
2022, section 3.1. query (B, H, N, D), keys (R, M + S, D), rows (B·G,), start and cursor (R,) -> scores and slots
(B, H, N, K).

Faiss takes lengths from the host, so every call reads the cursors back: no CUDA graph can hold it. Arithmetic is
Faiss's own for the keys' dtype; equal keys come in no particular order. Keys have to be finite: where a score is not,
an error is raised instead of too few neighbours returned.
"""

from __future__ import annotations

import torch
from torch import Tensor


def knn_search(
    query: Tensor, keys: Tensor, rows: Tensor, start: Tensor, cursor: Tensor, capacity: int, k: int
) -> tuple[Tensor, Tensor]:
    host = torch.cat((rows, start, cursor)).cpu().split((len(rows), len(start), len(cursor)))
    query = query.to(keys.dtype).contiguous()
    scores, positions = torch.ops.memtrans.native_faiss_search(query, keys, *host, capacity, k)  # (2, B, H, N, K)
    slots = _slots(positions, keys.shape[1], rows, start, cursor, capacity)
    missing = positions < 0
    if not bool((scores.isfinite() | missing).all()):
        raise RuntimeError("backend='faiss' met a score that is not finite: keys and queries must be finite for it")
    return _best_of_pieces(scores.masked_fill(missing, -torch.inf), slots, k)


def _slots(positions: Tensor, size: int, rows: Tensor, start: Tensor, cursor: Tensor, capacity: int) -> Tensor:
    """Positions (2, B, H, N, K) in a piece as slots: the first piece begins with the window, the second in slot 0."""
    first = torch.maximum(start, cursor - capacity).clamp(min=0)[rows] % size  # (B·G,)
    batch, heads = positions.shape[1:3]
    first = first.reshape(batch, -1).repeat_interleave(heads * batch // len(rows), dim=1)[..., None, None]
    offset = torch.stack((first, torch.zeros_like(first))).to(torch.int32)  # (2, B, H, 1, 1)
    return torch.where(positions < 0, -1, positions + offset)


def _best_of_pieces(scores: Tensor, slots: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best K of the two pieces' K each: (2, B, H, N, K) -> (B, H, N, K)."""
    scores, slots = (tensor.movedim(0, -2).flatten(-2) for tensor in (scores, slots))
    best, order = scores.topk(k, dim=-1)
    return best, slots.gather(-1, order)
