"""The XL caches of a model's layers, and how much of them each row's document filled.

Shapes: B documents, N tokens of the segment, X cached XL tokens, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from memtrans.checks import check_cache
from memtrans_kernels.checks import may_look

LENGTH = "xl_length"  # of a cache: how many of its newest tokens are the row's document, (B,) int64; None for all


class XLMemories(list[Tensor]):
    """The XL caches of all caching layers, of rows that hold different numbers of tokens of their documents.

    A list like any other. Each cache says how many in an attribute of its own, `xl_length`, which stays when the list
    is sliced, copied, or taken apart and put together again, as FSDP and DDP do, so that the next segment need not be
    told. A copy of a cache, `cache.clone()`, says nothing any more: `xl_length=xl_memories.length` goes with those.

    Attributes:
        length: (B,) int64, how many of the newest cached tokens are the row's document; before them comes what another
            document left, or nothing.

    >>> import torch
    >>> caches = XLMemories([torch.zeros(2, 4, 2, 8)], length=torch.tensor([4, 1]))
    >>> caches.length.tolist(), length_of(caches[:]).tolist()
    ([4, 1], [4, 1])
    """

    def __init__(self, caches: Iterable[Tensor] = (), length: Tensor | None = None) -> None:
        super().__init__(caches)
        if length is not None:
            mark(self, length)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A pickle of old has the length beside the caches."""
        if state.get("length") is not None:
            mark(self, state["length"])

    @property
    def length(self) -> Tensor | None:
        """See the class; None where its caches say nothing."""
        said = [getattr(cache, LENGTH, None) for cache in self]
        return said[0] if said else None


def mark(caches: Iterable[Tensor], length: Tensor | None) -> None:
    """Lets each cache say how many of its newest tokens are each row's document: (B,) int64, or None for all."""
    for cache in caches:
        setattr(cache, LENGTH, length)


def longest_of(xl_memories: Sequence[Tensor | None]) -> int:
    """X of the longest cache; 0 without any."""
    return max([0, *(cache.shape[-3] for cache in xl_memories if cache is not None)])


def length_of(xl_memories: Sequence[Tensor | None] | None) -> Tensor | None:
    """How many cached tokens are each row's document (B,); None where all are.

    Raises ValueError where some caches say it and others do not, or all of what the model returned forgot it.
    """
    caches = [cache for cache in xl_memories or () if cache is not None]
    said = [getattr(cache, LENGTH, None) for cache in caches]
    known = [length for length in said if length is not None]
    if len(known) < len(said) and (known or isinstance(xl_memories, XLMemories)):
        raise ValueError("xl_length must be given with XL memories that were taken apart since the model returned them")
    return known[0] if known else None


def check_said(caches: Sequence[Tensor | None], lengths: Tensor | None, xl_length: Tensor | None) -> None:
    """Raises ValueError where rows differ in what is real of them and the caches do not say how they were filled.

    The model marks what it returns; copies, and caches that moved to another device or dtype, have lost it.
    """
    silent = [cache for cache in caches if cache is not None and cache.shape[-3] and not hasattr(cache, LENGTH)]
    if xl_length is None and lengths is not None and silent and may_look(lengths) and len(lengths.unique()) > 1:
        raise ValueError(
            f"xl_length must be given with xl_memories that do not say how much of them each row filled, for rows of "
            f"different lengths {lengths.tolist()}: xl_length=xl_memories.length of the list that the model returned"
        )


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
