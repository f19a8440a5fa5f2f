"""Tensors that ranks send one another, and how the queries of all of them lie side by side.

Shapes: the letters of `memtrans_kernels`, and W ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from memtrans.distributed.ranks import Ranks
from memtrans.memory.layout import NO_ENTRY
from memtrans.memory.state import held


class _Exchange(torch.autograd.Function):
    """`exchange`, which is its own transpose."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        tensor = tensor.contiguous()
        received = torch.empty_like(tensor)
        with ranks.listening():
            dist.all_to_all_single(received, tensor, group=ranks.quick)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grad, ctx.ranks), None


def exchange(tensor: Tensor, ranks: Ranks) -> Tensor:
    """Sends slice w of a tensor (W, ...) to rank w; slice w of the result came from rank w. Differentiable."""
    return _Exchange.apply(tensor, ranks)


class _FromAll(torch.autograd.Function):
    """`from_all`: a rank's gradient is the sum of those that all ranks have for what it gave."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        received = tensor.new_empty(ranks.size, *tensor.shape)
        with ranks.listening():
            dist.all_gather_into_tensor(received.flatten(), tensor.contiguous().flatten(), group=ranks.quick)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return exchange(grad, ctx.ranks).sum(dim=0), None


def from_all(tensor: Tensor, ranks: Ranks) -> Tensor:
    """What every rank gives (...), on all of them (W, ...). Differentiable."""
    return _FromAll.apply(tensor, ranks)


def side_by_side(tensor: Tensor) -> Tensor:
    """The queries of all ranks (W, B, H, N, ...) as those of one segment (B, H, W·N, ...)."""
    return tensor.movedim(0, 2).flatten(2, 3)


def by_rank(tensor: Tensor, size: int) -> Tensor:
    """The reverse of `side_by_side`: what belongs to the queries of each rank (W, B, H, N, ...)."""
    return tensor.unflatten(2, (size, -1)).movedim(2, 0)


def fetched(ring: Tensor, rows: Tensor, entries: Tensor, *, total: Tensor, share: int, ranks: Ranks) -> Tensor:
    """Entries (B·G, E) of a memory spread over ranks, by number: (B·G, E, ...), zeros for NO_ENTRY.

    All ranks call it together and say which they want; one row after the other travels, from each to all.

    Args:
        ring: (R, slots, ...), this rank's keys, values or ids.
        rows: (B·G,), those of the entries.
        total: (R,), entries ever stored on all ranks together.
        share: how many of the newest entries of a row are looked at on each rank.
    """
    results, places = [], torch.arange(share, device=ring.device)
    for row, wanted in zip(rows[:, None], entries, strict=True):
        here = held(total[row], ranks.rank, ranks.size) - share + places
        everywhere = from_all(ring[row, here % ring.shape[1]], ranks)  # (W, share, ...)
        rank = wanted % ranks.size
        place = wanted.div(ranks.size, rounding_mode="floor") - held(total[row], rank, ranks.size) + share
        result = everywhere[rank, place.clamp(0, share - 1)]
        result[wanted == NO_ENTRY] = 0
        results.append(result)
    return torch.stack(results)
