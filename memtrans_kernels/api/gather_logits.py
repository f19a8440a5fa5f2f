"""Logits of given slots, for code that searches one way and attends another."""

from __future__ import annotations

import torch
from torch import Tensor

from memtrans_kernels import checks, ops
from memtrans_kernels.backends import check_name


def gather_logits(query: Tensor, keys: Tensor, rows: Tensor, slots: Tensor, *, backend: str = "auto") -> Tensor:
    """Gives the inner products of each query and the keys in its slots; differentiable in the query.

    What `knn_search` found has scores without a gradient, of a query rounded to the keys' dtype. This computes them
    anew where a gradient is wanted, or for a query that was not the one searched with. The memory is never
    differentiated.

    Args:
        query: (B, H, N, D), floating point; H a multiple of G.
        keys: (R, M + S, D), floating point, the ring.
        rows: (B·G,) int64, the ring row of each (document, group).
        slots: (B, H, N, K) int32, from `knn_search`; -1 for none.
        backend: one of `auto`, `reference`, `triton`.

    Returns:
        logits (B, H, N, K) float32 (float64 where query or keys are), -inf where the slot is -1.

    Raises:
        ValueError: a shape, device or number that does not fit.
        TypeError: a dtype that does not fit.
        RuntimeError: the named backend cannot run.
        NotImplementedError: second derivatives, torch.func.grad and jvp, with another backend than `reference`.

    Source: Wu et al. 2022, section 3.1.

    >>> keys, rows = torch.tensor([[[1.0, 0.0], [3.0, 4.0]]]), torch.tensor([0])
    >>> slots = torch.tensor([[[[1, -1]]]], dtype=torch.int32)
    >>> gather_logits(torch.ones(1, 1, 1, 2), keys, rows, slots).tolist()
    [[[[7.0, -inf]]]]
    """
    _check(query, keys, rows, slots)
    checks.within("rows", rows, 0, keys.shape[0] - 1)
    checks.within("slots", slots, -1, keys.shape[1] - 1)
    return ops.gather_logits(query, keys.detach(), rows, slots, check_name(backend))


@checks.remembered
def _check(query: Tensor, keys: Tensor, rows: Tensor, slots: Tensor) -> None:
    letters = checks.Letters()
    letters.bind("query", query, "B H N D")
    letters.bind("keys", keys, "R slots D")
    checks.few_slots("keys", letters["slots"])
    letters.bind("rows", rows, "B·G")
    letters.bind("slots", slots, "B H N K")
    checks.groups(letters)
    checks.floating(query=query, keys=keys)
    checks.typed(torch.int64, rows=rows)
    checks.typed(torch.int32, slots=slots)
    checks.same_device(query.device, keys=keys, rows=rows, slots=slots)
