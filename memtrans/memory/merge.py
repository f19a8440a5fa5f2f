"""Parts of a softmax, made one by their lse.

Shapes: the letters of `memtrans_kernels`, and P parts.
"""

from __future__ import annotations

from torch import Tensor


def merged(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax of P parts: outs (P, B, H, N, D) with lses (P, B, H, N), -inf for a part with nothing in it.

    >>> import torch
    >>> out, lse = merged(torch.tensor([[1.0], [5.0]]), torch.tensor([3.0, 1.0]).log())  # weights 3 and 1
    >>> out.tolist(), round(float(lse.exp()), 3)
    ([2.0], 4.0)
    """
    lses = lses.clamp(min=-1e30)  # a difference of infinities would be NaN, in the gradient too
    lse = lses.logsumexp(dim=0)
    out = ((lses - lse).exp()[..., None] * outs).sum(dim=0)
    return out.to(outs.dtype), lse
