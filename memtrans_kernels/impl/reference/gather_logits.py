"""gather_logits in plain PyTorch: the oracle of all tests, and the last-resort kernel.

logits[b, h, n, k] = <query[b, h, n], keys[rows[b·G + h // (H / G)], slots[b, h, n, k]]>, -inf where the slot is -1.

    query (B, H, N, D) · keys (R, M + S, D) · rows (B·G,) · slots (B, H, N, K) -> logits (B, H, N, K)

Source: Wu et al. 2022, section 3.1. Arithmetic is float32, or float64 where query or keys are; on CPU and CUDA tensors
alike, without a host round trip.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memtrans_kernels.precision import arithmetic_dtype

GATHERED_BYTES = 1 << 26  # of keys held at once: 64 MiB


def gather_logits(query: Tensor, keys: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """In blocks of queries; PyTorch can differentiate it any number of times."""
    dtype = arithmetic_dtype(query, keys)
    parts = [
        torch.einsum("bhnd,bhnkd->bhnk", part.to(dtype), _gather(keys, rows, of_part, dtype))
        for part, of_part in zip(*_blocks(keys, query, slots), strict=True)
    ]
    return torch.cat(parts, dim=2).masked_fill(slots < 0, -torch.inf)


def gather_logits_backward(grad: Tensor, query: Tensor, keys: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """Gradient of query: the keys found, weighted by the gradient of their logits (B, H, N, K)."""
    dtype = arithmetic_dtype(query, keys)
    grad = grad.to(dtype).masked_fill(slots < 0, 0.0)
    parts = [
        torch.einsum("bhnk,bhnkd->bhnd", part, _gather(keys, rows, of_part, dtype))
        for part, of_part in zip(*_blocks(keys, grad, slots), strict=True)
    ]
    return torch.cat(parts, dim=2).to(query.dtype)


def _blocks(keys: Tensor, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The tensors (B, H, N, ...), of which the slots come last, cut along N so that few keys are gathered at once."""
    batch, heads, _, neighbours = tensors[-1].shape
    of_query = batch * heads * neighbours * keys.shape[2] * 8
    return [tensor.split(max(1, GATHERED_BYTES // max(of_query, 1)), dim=2) for tensor in tensors]


def _gather(keys: Tensor, rows: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """The keys in the slots (B, H, N, K, D); zeros where the slot is -1, whatever the ring holds."""
    batch, heads = slots.shape[:2]
    row = rows.reshape(batch, -1).repeat_interleave(heads * batch // max(rows.numel(), 1), dim=1)  # (B, H)
    found = keys[row[:, :, None, None], slots.clamp(min=0)].to(dtype)
    return found.masked_fill((slots < 0)[..., None], 0.0)
