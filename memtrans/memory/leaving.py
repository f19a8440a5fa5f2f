"""What leaves a local context for the memory: the oldest keys and values, that the XL cache has no room for.

Shapes: B documents, G key/value heads, N tokens of the segment, L local keys, D head width, E of values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memtrans.memory.snapshot import MemorySnapshot


def add_leaving(
    snapshot: MemorySnapshot,
    key: Tensor,
    value: Tensor,
    *,
    kept: int,
    length: int,
    local_length: Tensor | None = None,
    lengths: Tensor | None = None,
) -> MemorySnapshot:
    """Adds to a memory all but the newest of the local keys and values; returns the state after that.

    Args:
        snapshot: of the memory to add to.
        key, value: (B, G, L, D) and (B, G, L, E), the segment's N behind what was cached before it.
        kept: X, how many of the newest stay in the XL cache.
        length: N.
        local_length: (B,) int64, how many of the newest of the L are of this document. Default: all.
        lengths: (B,) int64, how many of the N tokens are real. Default: all.
    """
    local_keys = key.shape[2]
    leaving = max(0, local_keys - kept)
    key, value = key[:, :, :leaving].detach(), value[:, :, :leaving].detach()  # (B, G, leaving, D)
    if local_length is None:  # the oldest ones leave as they lie
        return snapshot.append(key, value, None if lengths is None else (leaving - length + lengths).clamp(min=0))
    first, last = leaving_range(leaving, local_keys, length, local_length, lengths)  # (B,) each
    index = (first[:, None] + torch.arange(leaving, device=key.device)).clamp(max=max(leaving - 1, 0))
    index = index[:, None, :, None].expand(-1, key.shape[1], -1, -1)
    key, value = (given.gather(2, index.expand(-1, -1, -1, given.shape[3])) for given in (key, value))
    return snapshot.append(key, value, (last - first).clamp(min=0))


def leaving_range(
    leaving: int, local_keys: int, length: int, local_length: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Which of the `leaving` oldest local keys leave, [first, last) per document: not those of another document.

    For each token of padding one more stays, because none of the padding is cached; last may lie before first.
    """
    given = local_length if local_length is not None else lengths
    assert given is not None
    first = torch.zeros_like(given) if local_length is None else (local_keys - local_length).clamp(0, leaving)
    last = torch.full_like(given, leaving) if lengths is None else leaving - (length - lengths)
    return first, last
