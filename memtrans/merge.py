"""Answers in parts, made one: the candidates of several searches by their scores, parts of a softmax by their lse.

Shapes: the letters of `memtrans_kernels`, and W ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def of_all_ranks(tensor: Tensor) -> Tensor:
    """Candidates (W, B, H, N, K) as those of each query (B, H, N, W·K)."""
    return tensor.movedim(0, -2).flatten(-2)


def ranked(scores: Tensor, ages: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates (W, B, H, N, K) by score, older first among equals; ages in [0, 2^31).

    Returns which of the W·K each place goes to (B, H, N, W·K), and the place of each candidate (W, B, H, N, K).
    """
    order = best_first(of_all_ranks(scores), of_all_ranks(ages))
    ranking = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    places = torch.empty_like(order).scatter_(-1, order, ranking)
    return order, places.unflatten(-1, (scores.shape[0], scores.shape[-1])).movedim(-2, 0)


def best_first(scores: Tensor, ages: Tensor) -> Tensor:
    """The order of candidates (..., C) by score, older first among equals; ages in [0, 2^31)."""
    if scores.dtype != torch.float32:
        older = ages.argsort(dim=-1, descending=True)
        return older.gather(-1, scores.gather(-1, older).argsort(dim=-1, descending=True, stable=True))
    bits = (scores + 0.0).view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()  # integers in the order of the floats
    return ((ordered << 32) | ages).argsort(dim=-1, descending=True)


def merged(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax of P parts: outs (P, B, H, N, D) with lses (P, B, H, N), -inf for a part with nothing in it.

    >>> out, lse = merged(torch.tensor([[1.0], [5.0]]), torch.tensor([3.0, 1.0]).log())  # weights 3 and 1
    >>> out.tolist(), round(float(lse.exp()), 3)
    ([2.0], 4.0)
    """
    lses = lses.clamp(min=-1e30)  # a difference of infinities would be NaN, in the gradient too
    lse = lses.logsumexp(dim=0)
    out = ((lses - lse).exp()[..., None] * outs).sum(dim=0)
    return out.to(outs.dtype), lse
