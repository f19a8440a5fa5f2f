"""The XL caches of a model's layers, and how much of them each row's document filled.

Shapes: B documents, N tokens of the segment, X cached XL tokens, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from memtrans.checks import check_cache
from memtrans.segments import Segment
from memtrans_kernels.checks import may_look

LENGTH = "xl_length"  # of a cache: how many of its newest tokens are the row's document, (B,) int64; None for all
CLEARINGS = "xl_clearings"  # of a cache: of each memory of the model, how often its rows were cleared when it was made


class XLMemories(list[Tensor]):
    """The XL caches of all caching layers, of rows that hold different numbers of tokens of their documents.

    A list like any other. Each cache says how many in an attribute of its own, `xl_length`, which stays when the list
    is sliced, copied, or taken apart and put together again, as FSDP and DDP do, so that the next segment need not be
    told, and so do `copy.deepcopy` and a pickle. A cache that was cloned, cast or moved to another device says nothing
    any more: `xl_length=xl_memories.length` goes with those.

    A cache also knows when it was made. Of a row that a memory was told to forget since, nothing of it is seen or
    stored, whatever `length` says.

    Attributes:
        length: (B,) int64, how many of the newest cached tokens are the row's document; before them comes what another
            document left, or nothing.

    >>> import torch
    >>> caches = XLMemories([torch.zeros(2, 4, 2, 8)], length=torch.tensor([4, 1]))
    >>> caches.length.tolist(), length_of(caches[:]).tolist()
    ([4, 1], [4, 1])
    """

    def __init__(
        self, caches: Iterable[Tensor] = (), length: Tensor | None = None, clearings: tuple[Tensor, ...] = ()
    ) -> None:
        super().__init__(caches)
        if length is not None:
            mark(self, length, clearings)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A pickle of old has the length beside the caches."""
        if state.get("length") is not None:
            mark(self, state["length"])

    @property
    def length(self) -> Tensor | None:
        """See the class; None where its caches say nothing."""
        said = [getattr(cache, LENGTH, None) for cache in self]
        return said[0] if said else None


def mark(caches: Iterable[Tensor], length: Tensor | None, clearings: tuple[Tensor, ...] = ()) -> None:
    """Lets each cache say how many of its newest tokens are each row's document: (B,) int64, or None for all.

    clearings: of each memory, how often its rows (R,) were cleared until now.
    """
    for cache in caches:
        setattr(cache, LENGTH, length)
        setattr(cache, CLEARINGS, clearings)


def clearings_said(caches: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """What `mark` let caches say of clearings; nothing where they do not say it."""
    said = [getattr(cache, CLEARINGS, ()) for cache in caches if cache is not None]
    return said[0] if said else ()


def is_silent(caches: Sequence[Tensor | None]) -> bool:
    """Whether one of the caches that hold something says nothing."""
    return any(cache is not None and cache.shape[-3] and not hasattr(cache, LENGTH) for cache in caches)


def filled(caches: Sequence[Tensor | None]) -> Tensor:
    """How many of the newest tokens (B,) int64 stand behind the zeros that lead the longest of the caches.

    The model leaves zeros in place of what is not a row's document.

    >>> filled([torch.tensor([0.0, 0.0, 3.0, 0.0]).reshape(1, 4, 1, 1)]).tolist()
    [2]
    """
    longest = longest_of(caches)
    cache = next(cache for cache in caches if cache is not None and cache.shape[-3] == longest)
    some = (cache.detach() != 0).any(-1).any(-1)  # (B, X), or (B, G, X)
    some = some if some.dim() == 2 else some.any(1)
    return some.to(torch.int64).cummax(dim=1).values.sum(dim=1)


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


def check_said(
    caches: Sequence[Tensor | None], lengths: Tensor | None, xl_length: Tensor | None, validate: bool = False
) -> None:
    """Raises ValueError where rows differ in what is real of them, or are not full, and the caches do not say so.

    The model marks what it returns; copies, and caches that moved to another device or dtype, have lost it.
    """
    if xl_length is not None or not is_silent(caches):
        return
    must = "xl_length must be given with xl_memories that do not say how much of them each row filled"
    mend = "xl_length=xl_memories.length of the list that the model returned"
    if lengths is not None and may_look(lengths) and len(lengths.unique()) > 1:
        raise ValueError(f"{must}, for rows of different lengths {lengths.tolist()}: {mend}")
    held = filled(caches)
    if may_look(held, validate) and bool((held < longest_of(caches)).any()):
        raise ValueError(f"{must}, where zeros lead all but {held.tolist()} of {longest_of(caches)} tokens: {mend}")


def length_found(caches: Sequence[Tensor | None], xl_length: Tensor | None) -> Tensor | None:
    """`xl_length` (B,); where that is None and caches say nothing, what stands behind the zeros that lead in them.

    Where values may be looked at, `check_said` has found them full.
    """
    if xl_length is not None or not is_silent(caches):
        return xl_length
    held = filled(caches)
    return None if may_look(held) else held


def length_after(caches: Sequence[Tensor | None], segment: Segment, xl_length: Tensor | None) -> Tensor | None:
    """What `xl_length` is after a segment of N tokens, before a cache's size limits it: (B,), None for all.

    caches, xl_length: before it.

    >>> cache, segment = torch.zeros(2, 4, 2, 8), Segment(3, torch.tensor([3, 1]))
    >>> length_after([cache], segment, None).tolist(), length_after([cache], segment, torch.tensor([0, 2])).tolist()
    ([7, 5], [3, 3])
    """
    size, counted, begun = longest_of(caches), segment.counted, segment.beginnings
    held = None
    if xl_length is not None:
        held = xl_length.clamp(max=size) + (segment.length if counted is None else counted)  # (B,)
    elif counted is not None:
        held = size + counted
    if begun is None:
        return held
    tail = 0 if segment.lengths is None else segment.length - segment.lengths
    return torch.where(begun.left < 0, size + segment.length if held is None else held, begun.left - tail)


def caches_of(xl_memories: Sequence[Tensor | None] | None, layers: Sequence[int]) -> list[Tensor | None]:
    """The XL caches given, or none for each of the caching layers.

    Raises TypeError for what is no sequence, ValueError where their number is another.
    """
    if xl_memories is not None and not isinstance(xl_memories, Sequence):
        raise TypeError(f"xl_memories must be a sequence of caches, got {type(xl_memories).__name__}")
    caches: list[Tensor | None] = [None] * len(layers) if xl_memories is None else list(xl_memories)
    if len(caches) != len(layers):
        raise ValueError(f"xl_memories must hold one cache for each of the layers {layers}, got {len(caches)}")
    return caches


def caches_attended(
    caches: Sequence[Tensor | None], shift: int, length: int, real: Tensor | None
) -> list[Tensor | None]:
    """For each caching layer the XL cache of the one `shift` above, wrapping round.

    A row without a real token keeps its caches where they are: its next segment is then read as if this one, of N =
    `length` tokens, had not been. real: (B,), real tokens of each row. Default: all.

    >>> low, high = torch.zeros(2, 1, 2, 1), torch.ones(2, 1, 2, 1)
    >>> [cache[:, 0, 0, 0].tolist() for cache in caches_attended([low, high], 1, 4, torch.tensor([3, 0]))]
    [[1.0, 0.0], [0.0, 1.0]]
    """
    if length == 0 or not caches or shift % len(caches) == 0:
        return list(caches)
    shifted = [caches[(place + shift) % len(caches)] for place in range(len(caches))]
    if real is None:
        return shifted
    return [_of_rows(real > 0, other, own) for own, other in zip(caches, shifted, strict=True)]


def _of_rows(chosen: Tensor, cache: Tensor | None, other: Tensor | None) -> Tensor | None:
    """`cache` for the rows where `chosen` (B,) is True, else `other`; all of it where they are not of one size."""
    if cache is None or other is None or cache.shape != other.shape:
        return cache
    return torch.where(chosen.reshape(-1, *[1] * (cache.dim() - 1)), cache, other)


def check_caches(
    caches: Sequence[Tensor | None], batch: int, kv_heads: int, widths: tuple[int, int], device: torch.device
) -> None:
    """Raises ValueError or TypeError unless every XL cache is (B, X, 2, D), or (B, G, X, 2, D) if G > 1.

    widths: D and E, of keys and values; see `check_cache`.
    """
    for place, cache in enumerate(caches):
        if cache is not None:
            check_cache(f"xl_memories[{place}]", cache, batch, kv_heads, widths, device)
