"""knn_search by the flat index of the `faiss` package, on the CPU: what backend="faiss" is on CPU tensors.

scores[b, h, n] = the K largest <query[b, h, n], key> over the visible keys of row rows[b·G + h // (H / G)], Wu et al.
2022, section 3.1. query (B, H, N, D), keys (R, M + S, D), rows (B·G,), start and cursor (R,) -> scores and slots
(B, H, N, K).

A rival to compare with: every call copies each row's visible keys into an index of their own. Arithmetic is float32;
equal keys come in no particular order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def knn_search(
    query: Tensor, keys: Tensor, rows: Tensor, start: Tensor, cursor: Tensor, capacity: int, k: int
) -> tuple[Tensor, Tensor]:
    batch, heads, length, width = query.shape
    shape = (len(rows), batch * heads * length // max(len(rows), 1), k)
    scores = torch.full(shape, -torch.inf, dtype=torch.float32, device=query.device)
    slots = torch.full(shape, -1, dtype=torch.int32, device=query.device)
    by_row = query.to(keys.dtype).float().reshape(*shape[:2], width)
    if scores.numel():
        for index, row in enumerate(rows.tolist()):
            first = max(0, int(start[row]), int(cursor[row]) - capacity)
            shown = torch.arange(first, int(cursor[row]), device=query.device) % keys.shape[1]
            shown = shown[keys[row, shown].isfinite().all(dim=-1)]
            if len(shown):
                _search_row(by_row[index], keys[row, shown].float(), shown, scores[index], slots[index])
    return scores.reshape(batch, heads, length, k), slots.reshape(batch, heads, length, k)


def _search_row(query: Tensor, row_keys: Tensor, shown: Tensor, scores: Tensor, slots: Tensor) -> None:
    """Writes the best of row_keys (C, D), which lie in the slots `shown` (C,), for query (Q, D)."""
    import faiss

    index = faiss.IndexFlatIP(query.shape[1])
    index.add(row_keys.numpy())
    found = min(scores.shape[1], len(shown))
    best, position = (torch.from_numpy(array) for array in index.search(query.numpy(), found))
    missing = (position < 0) | best.isnan() | (best == -torch.inf)
    scores[:, :found] = best.masked_fill(missing, -torch.inf)
    slots[:, :found] = shown[position.clamp(min=0)].masked_fill(missing, -1).to(torch.int32)
