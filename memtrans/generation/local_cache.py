"""The keys and values that a segment attends to while it is still being written, in storage of one shape.

    slot   0 ... X - 1                X ... X + N - 1
           the XL cache, the newest   the segment's tokens, the first at X
           at X - 1

A layer without an XL cache has X = 0. A whole segment is this buffer exactly as training sees it: what leaves at its
end are the slots before N, what stays are the newest X.
Shapes: B documents, G key/value heads, N tokens of a segment, X cached XL tokens, D head width, E of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memtrans.local_keys import LocalView


class LocalCache:
    """Local keys and values of one layer, for B documents that are read and continued.

    Args:
        documents: B.
        kv_heads: G.
        width: D.
        value_width: E. Default: D.
        cached: X.
        segment: N.
        dtype: of keys and values.
        device: of keys and values.
    """

    def __init__(
        self,
        documents: int,
        kv_heads: int,
        width: int,
        *,
        cached: int,
        segment: int,
        dtype: torch.dtype,
        device: torch.device,
        value_width: int | None = None,
    ) -> None:
        self.cached, self.segment = cached, segment
        size = (documents, kv_heads, cached + segment)
        self.keys = torch.zeros(*size, width, dtype=dtype, device=device)
        self.values = torch.zeros(*size, value_width or width, dtype=dtype, device=device)

    def newest(self) -> tuple[Tensor, Tensor]:
        """What a whole segment leaves for the next one: the last X keys and values."""
        return self.keys[:, :, self.segment :], self.values[:, :, self.segment :]

    def begin(self, keys: Tensor, values: Tensor, documents: Tensor) -> None:
        """Makes keys (B, G, X, D) and values (B, G, X, E) the XL cache of the documents where the mask (B,) is True."""
        chosen = documents[:, None, None, None]
        for held, new in ((self.keys, keys), (self.values, values)):
            cache = held[:, :, : self.cached]
            cache.copy_(torch.where(chosen, new, cache))  # the right side is a tensor of its own: X may exceed N


@dataclass(frozen=True)
class ReadingView(LocalView):
    """Some documents read a piece of text at one place: the new tokens are the last of the L local keys.

    Attributes:
        cache: of the layer.
        rows: the documents, counted in the cache.
        position: of the first new token, from the segment's beginning.
        cached: how many XL tokens the documents have.
    """

    cache: LocalCache
    rows: Tensor | slice
    position: int
    cached: int

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        cache = self.cache
        first, new = cache.cached - min(self.cached, cache.cached), cache.cached + self.position
        end = new + key.shape[2]
        cache.keys[self.rows, :, new:end] = key.to(cache.keys.dtype)  # (rows, G, N, D)
        cache.values[self.rows, :, new:end] = value.to(cache.values.dtype)
        keys, values = cache.keys[self.rows, :, first:end], cache.values[self.rows, :, first:end]  # (rows, G, L, D)
        return keys.to(key.dtype), values.to(value.dtype)


@dataclass(frozen=True)
class WritingView(LocalView):
    """Every document writes one token at a place of its own, known to the device alone; L is always X + N.

    A bias hides what lies behind the place.

    Attributes:
        cache: of the layer.
        slot: (B, 1, 1, 1) int64, where the cache keeps the token of each document.
    """

    cache: LocalCache
    slot: Tensor

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        cache = self.cache
        cache.keys.scatter_(2, self.slot.expand_as(key), key.to(cache.keys.dtype))  # (B, G, 1, D)
        cache.values.scatter_(2, self.slot.expand_as(value), value.to(cache.values.dtype))
        return cache.keys.to(key.dtype), cache.values.to(value.dtype)


def rows_of(rows: Sequence[int], documents: int, device: torch.device) -> Tensor | slice:
    """An index that picks documents; a slice, which copies nothing, where it is all of them in order."""
    if list(rows) == list(range(documents)):
        return slice(None)
    return torch.tensor(rows, dtype=torch.int64, device=device)
