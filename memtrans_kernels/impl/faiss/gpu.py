"""knn_search by Faiss on the GPU, through csrc/faiss: a rival to compare with.

scores[b, h, n] = the K largest <query[b, h, n], key> over the visible keys of row rows[b·G + h // (H / G)], Wu et al.
2022, section 3.1. query (B, H, N, D), keys (R, M + S, D), rows (B·G,), start and cursor (R,) -> scores and slots
(B, H, N, K).

Faiss takes the number of keys from the host, so it is given all slots of a row, whatever they hold, in a copy with one
more column: 0 for what a search may see, else so low a number that, times that of the query, it outweighs any product.
So the host never waits for the device. Columns of zeros make rows a multiple of 16 bytes. Arithmetic is Faiss's own for
the keys' dtype; equal keys come in no particular order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# What the column of a hidden key and that of a query hold, with opposite signs: the score of a hidden key is minus its
# square, and a visible key is found if its score is above half of that.
COLUMN = {torch.float16: 65504.0, torch.bfloat16: 2.0**60, torch.float32: 2.0**60}
ALIGNED = 16  # bytes


def knn_search(
    query: Tensor, keys: Tensor, rows: Tensor, start: Tensor, cursor: Tensor, capacity: int, k: int
) -> tuple[Tensor, Tensor]:
    batch, heads, length, width = query.shape
    sets = keys[rows]  # (B·G, M + S, D)
    seen = _visible(start[rows], cursor[rows], capacity, keys.shape[1]) & sets.isfinite().all(dim=-1)
    of_queries = query.to(keys.dtype).reshape(len(rows), query[..., 0].numel() // max(len(rows), 1), width)
    scores, slots = torch.ops.memtrans.native_faiss_search(*with_column(of_queries, sets, seen), k)
    missing = (slots < 0) | ~(scores > -0.5 * COLUMN[keys.dtype] ** 2)
    scores, slots = scores.masked_fill(missing, -torch.inf), slots.masked_fill(missing, -1)
    return scores.reshape(batch, heads, length, k), slots.reshape(batch, heads, length, k)


def with_column(query: Tensor, keys: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (sets, Q, D) and keys (sets, C, D) of products that say which keys are seen, (sets, C) bool.

    What is not seen is zero but for its column, so that no number in it counts.
    """
    column, width = COLUMN[keys.dtype], keys.shape[2]
    step = ALIGNED // keys.element_size()
    more = (0, -(-(width + 1) // step) * step - width)  # zeros behind D
    query, keys = F.pad(query, more), F.pad(keys.masked_fill(~seen[..., None], 0.0), more)
    query[..., width] = column
    keys[..., width] = torch.where(seen, 0.0, -column)
    return query, keys


def _visible(start: Tensor, cursor: Tensor, capacity: int, slots: int) -> Tensor:
    """Which slots of rows hold an entry that a search may see: (B·G, M + S) bool. start, cursor: (B·G,)."""
    newest = cursor[:, None] - 1
    entry = newest - (newest - torch.arange(slots, device=cursor.device)) % slots  # the newest that went there
    return (entry >= start.clamp(min=0)[:, None]) & (entry > newest - capacity)
