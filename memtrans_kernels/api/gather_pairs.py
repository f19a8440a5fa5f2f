"""Keys and values of given slots, for code that searches here and attends in its own way."""

from __future__ import annotations

import torch
from torch import Tensor

from memtrans_kernels import checks, ops
from memtrans_kernels.backends import check_name


def gather_pairs(
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    slots: Tensor,
    dtype: torch.dtype | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Copies the keys and values of the entries that a search found, side by side, in one pass. No gradient.

    Args:
        keys: (R, M + S, D), floating point, the ring.
        values: (R, M + S, D), floating point, likewise.
        rows: (B·G,) int64, the ring row of each (document, group); H a multiple of G.
        slots: (B, H, N, K) int32, from `knn_search`; -1 for none.
        dtype: of the result, floating point. Default: that of the keys.
        backend: one of `auto`, `reference`, `triton`, `native`.

    Returns:
        pairs (B, H, N, K, 2, D), key first, then value; zeros where the slot is -1.

    Raises:
        ValueError: a shape, device or number that does not fit.
        TypeError: a dtype that does not fit.
        RuntimeError: the named backend cannot run.

    Source: Wu et al. 2022, section 3.1.

    >>> keys, rows = torch.tensor([[[1.0], [3.0]]]), torch.tensor([0])
    >>> gather_pairs(keys, 10 * keys, rows, torch.tensor([[[[1, -1]]]], dtype=torch.int32)).tolist()
    [[[[[[3.0], [30.0]], [[0.0], [0.0]]]]]]
    """
    dtype = keys.dtype if dtype is None and isinstance(keys, Tensor) else dtype
    checks.stored(dtype=dtype)
    _check(keys, values, rows, slots)
    checks.within("rows", rows, 0, keys.shape[0] - 1)
    checks.within("slots", slots, -1, keys.shape[1] - 1)
    return ops.gather_pairs(keys.detach(), values.detach(), rows, slots, dtype, check_name(backend))


@checks.remembered
def _check(keys: Tensor, values: Tensor, rows: Tensor, slots: Tensor) -> None:
    letters = checks.Letters()
    letters.bind("keys", keys, "R slots D")
    checks.few_slots("keys", letters["slots"])
    letters.bind("values", values, "R slots D")
    letters.bind("rows", rows, "B·G")
    letters.bind("slots", slots, "B H N K")
    checks.groups(letters)
    checks.floating(keys=keys, values=values)
    checks.typed(torch.int64, rows=rows)
    checks.typed(torch.int32, slots=slots)
    checks.same_device(keys.device, values=values, rows=rows, slots=slots)
