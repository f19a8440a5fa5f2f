"""Keys and values of given slots as an operator; it has no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from memtrans_kernels import backends
from memtrans_kernels.eager import is_plain


def gather_pairs(keys: Tensor, values: Tensor, rows: Tensor, slots: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """Neither keys nor values may require a gradient."""
    tensors = (keys, values, rows, slots)
    if is_plain(*tensors):
        return backends.run("gather_pairs", backend, *tensors, dtype)
    return _gather_pairs(*tensors, dtype, backend)


@torch.library.custom_op("memtrans::gather_pairs", mutates_args=())
def _gather_pairs(
    keys: Tensor, values: Tensor, rows: Tensor, slots: Tensor, dtype: torch.dtype, backend: str = "auto"
) -> Tensor:
    return backends.run("gather_pairs", backend, keys, values, rows, slots, dtype)


@_gather_pairs.register_fake
def _(keys: Tensor, values: Tensor, rows: Tensor, slots: Tensor, dtype: torch.dtype, backend: str = "auto") -> Tensor:
    return keys.new_empty((*slots.shape, 2, keys.shape[2]), dtype=dtype)
