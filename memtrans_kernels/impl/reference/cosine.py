"""cosine in plain PyTorch: the oracle of all tests, and the last-resort kernel.

Forward: u = x / max(|x|, 1e-12) along D. Backward: (g - u <g, u>) / |x|, and g / 1e-12 where |x| is smaller than that.

    query, key (..., D) -> the same shapes, contiguous

Source: Henry et al. 2020 (arXiv 2010.04245). Arithmetic is float64, so that no square overflows, with one rounding at
the end; on CPU and CUDA tensors alike, without a host round trip.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 1e-12


def cosine(query: Tensor, key: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Unit vectors along D; PyTorch can differentiate them any number of times."""
    return _unit(query, dtype or query.dtype), _unit(key, dtype or key.dtype)


def cosine_backward(grad_query: Tensor, grad_key: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of query and key, from those of their unit vectors."""
    return _unit_backward(grad_query, query), _unit_backward(grad_key, key)


def _length(tensor: Tensor) -> Tensor:
    """|x| in float64, which holds the square of every narrower number; of float64 through the largest component."""
    if tensor.dtype != torch.float64:
        return torch.linalg.vector_norm(tensor, dim=-1, keepdim=True, dtype=torch.float64)
    largest = F.pad(tensor.detach().abs(), (0, 1)).amax(dim=-1, keepdim=True)  # padded: D may be 0
    largest = torch.where((largest > 0.0) & largest.isfinite(), largest, 1.0)
    return torch.linalg.vector_norm(tensor / largest, dim=-1, keepdim=True) * largest


def _unit(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return (tensor / _length(tensor).clamp(min=SMALLEST)).to(dtype).contiguous()


def _unit_backward(grad: Tensor, tensor: Tensor) -> Tensor:
    norm = _length(tensor)
    divisor = norm.clamp(min=SMALLEST)
    unit = tensor / divisor
    along = (grad * unit).sum(dim=-1, keepdim=True)
    projected = grad - torch.where(norm > SMALLEST, along, 0.0) * unit  # below it the divisor is a constant
    return (projected / divisor).to(tensor.dtype).contiguous()
