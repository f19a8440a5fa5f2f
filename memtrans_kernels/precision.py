"""In what precision the operators compute."""

from __future__ import annotations

import torch
from torch import Tensor


def arithmetic_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, but float64 if any tensor is, as gradient checks use them.

    >>> arithmetic_dtype(torch.ones(1).half()), arithmetic_dtype(torch.ones(1), torch.ones(1).double())
    (torch.float32, torch.float64)
    """
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
