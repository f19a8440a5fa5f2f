"""Key and value of a token in one tensor: side by side on an axis of two, or in one row where they differ in width.

Shapes: D width of keys, E of values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pair_shape(width: int, value_width: int) -> tuple[int, int]:
    """The last two axes of such a tensor.

    >>> pair_shape(8, 8), pair_shape(8, 4)
    ((2, 8), (1, 12))
    """
    return (2, width) if width == value_width else (1, width + value_width)


def paired(key: Tensor, value: Tensor) -> Tensor:
    """key (..., D) and value (..., E) as (..., 2, D), or (..., 1, D + E) where the widths differ.

    >>> paired(torch.zeros(3, 8), torch.zeros(3, 4)).shape
    torch.Size([3, 1, 12])
    """
    if key.shape[-1] == value.shape[-1]:
        return torch.stack((key, value), dim=-2)
    return torch.cat((key, value), dim=-1).unsqueeze(-2)


def taken_apart(pairs: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """key (..., D) and value (..., E) of what `paired` gave, for D = `width`.

    >>> key, value = taken_apart(torch.zeros(3, 1, 12), 8)
    >>> key.shape, value.shape
    (torch.Size([3, 8]), torch.Size([3, 4]))
    """
    if pairs.shape[-2] == 2:
        key, value = pairs.unbind(dim=-2)
        return key, value
    return pairs[..., 0, :width], pairs[..., 0, width:]
