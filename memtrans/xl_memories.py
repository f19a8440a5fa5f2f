"""The XL caches of a model's layers, and how much of them each row's document filled.

Shapes: B documents, N tokens of the segment, X cached XL tokens, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from memtrans.checks import check_cache


class XLMemories(list[Tensor]):
    """The XL caches of all caching layers, of rows that hold different numbers of tokens of their documents.

    A list like any other, which also says how many, so that the next segment need not be told. A copy made cache by
    cache, `[cache.clone() for cache in xl_memories]`, says nothing any more: `xl_length=xl_memories.length` goes with
    it.

    Attributes:
        length: (B,) int64, how many of the newest cached tokens are the row's document; before them comes what another
            document left, or nothing.

    >>> import torch
    >>> XLMemories([torch.zeros(2, 4, 2, 8)], length=torch.tensor([4, 1])).length.tolist()
    [4, 1]
    """

    def __init__(self, caches: Iterable[Tensor] = (), length: Tensor | None = None) -> None:
        super().__init__(caches)
        self.length = length


def longest_of(xl_memories: Sequence[Tensor | None]) -> int:
    """X of the longest cache; 0 without any."""
    return max([0, *(cache.shape[-3] for cache in xl_memories if cache is not None)])


def length_of(xl_memories: Sequence[Tensor | None] | None) -> Tensor | None:
    """How many cached tokens are each row's document (B,); None where all are."""
    if not isinstance(xl_memories, XLMemories):
        return None
    if xl_memories.length is None:
        raise ValueError("xl_length must be given with XL memories that were taken apart since the model returned them")
    return xl_memories.length


def length_after(
    xl_memories: Sequence[Tensor | None], length: int, lengths: Tensor | None, xl_length: Tensor | None
) -> Tensor | None:
    """What `xl_length` is after a segment of N = `length` tokens, before a cache's size limits it: (B,), None for all.

    xl_memories, xl_length: before it. lengths: (B,), real tokens of it. Default: all.
    """
    size = longest_of(xl_memories)
    if xl_length is not None:
        return xl_length.clamp(max=size) + (length if lengths is None else lengths)
    return None if lengths is None else size + lengths


def caches_of(xl_memories: Sequence[Tensor | None] | None, layers: Sequence[int]) -> list[Tensor | None]:
    """The XL caches given, or none for each of the caching layers; raises ValueError where their number is another."""
    caches: list[Tensor | None] = [None] * len(layers) if xl_memories is None else list(xl_memories)
    if len(caches) != len(layers):
        raise ValueError(f"xl_memories must hold one cache for each of the layers {layers}, got {len(caches)}")
    return caches


def check_caches(caches: Sequence[Tensor | None], batch: int, kv_heads: int, width: int, device: torch.device) -> None:
    """Raises ValueError or TypeError unless every XL cache is (B, X, 2, D), or (B, G, X, 2, D) if G > 1."""
    for place, cache in enumerate(caches):
        if cache is not None:
            check_cache(f"xl_memories[{place}]", cache, batch, kv_heads, width, device)
