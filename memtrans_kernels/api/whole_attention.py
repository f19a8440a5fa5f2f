"""Attention to all that a memory holds, where nothing is learned from it."""

from __future__ import annotations

import torch
from torch import Tensor

from memtrans_kernels import checks, ops
from memtrans_kernels.attention_inputs import WholeInputs
from memtrans_kernels.backends import check_name
from memtrans_kernels.eager import is_differentiated_by_transform
from memtrans_kernels.ledger import Ledger


def whole_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    start: Tensor,
    cursor: Tensor,
    capacity: int,
    scale: Tensor,
    local_out: Tensor | None = None,
    local_lse: Tensor | None = None,
    memory_offset: Tensor | None = None,
    *,
    ledger: Ledger | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attends to all visible entries of each query's row where they lie, without a search; no gradient.

    Visible in a row are the entries `[max(start, cursor - M), cursor)` without those whose key has a non-finite
    component, as in `knn_search`. For small memories: the time grows with M. `triton` casts keys and values to the
    query's dtype, so they must be within its range: of a float16 query, 65,504.

    Args:
        query: (B, H, N, D), floating point; H a multiple of G.
        keys: (R, M + S, D), floating point, the ring.
        values: (R, M + S, E), floating point, likewise.
        rows: (B·G,) int64, the ring row of each (document, group).
        start: (R,) int64, the first entry that a row holds.
        cursor: (R,) int64, one past the last entry that a row holds.
        capacity: M, how many entries are visible at most.
        scale: (H,), floating point, what products are multiplied by.
        local_out: (B, H, N, E), floating point, what else the same softmax attended to, as `local_attention` returns
            it. Default: the memory alone.
        local_lse: (B, H, N), floating point, the logarithm of that part's denominator; both or neither.
        memory_offset: (H,), floating point, added to the memory's logits. Default: nothing.
        ledger: the memory's host counts: a call that comes after more than `spare` new entries raises.
        backend: one of `auto`, `reference`, `triton`.

    Returns:
        out (B, H, N, E) in the query's dtype, zeros for a query that sees nothing; and lse (B, H, N) float32 (float64
        where the query is), the logarithm of the whole denominator, -inf there.

    Raises:
        ValueError: a shape, device or number that does not fit, or one of `local_out` and `local_lse` without the
            other.
        TypeError: a dtype that does not fit.
        RuntimeError: the named backend cannot run, or a gradient is wanted, by torch.func or in forward mode too:
            `memory_attention` has one.
        StaleMemoryError: see `ledger`.

    Source: Wu et al. 2022, section 3.1.

    >>> keys = values = torch.tensor([[[1.0], [3.0], [2.0], [9.0]]])
    >>> start, cursor, rows = torch.tensor([0]), torch.tensor([3]), torch.tensor([0])
    >>> out, lse = whole_attention(
    ...     torch.zeros(1, 1, 1, 1), keys, values, rows, start, cursor, capacity=4, scale=torch.ones(1)
    ... )
    >>> round(out.item(), 4), round(lse.exp().item(), 4)
    (2.0, 3.0)
    """
    capacity = checks.integer("capacity", capacity)
    inputs = WholeInputs(
        query, keys, values, rows, start, cursor, capacity, scale, local_out, local_lse, memory_offset
    )  # fmt: skip
    _check(*inputs)
    checks.within("rows", rows, 0, keys.shape[0] - 1)
    checks.within("start", start, 0)
    checks.within("cursor", cursor, 0)
    if torch.is_grad_enabled():
        for name, tensor in inputs._asdict().items():
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                raise RuntimeError(f"whole_attention has no gradient, and {name} requires one: call it under no_grad")
    if is_differentiated_by_transform(*inputs):
        raise RuntimeError("whole_attention has no derivatives by torch.func or in forward mode: memory_attention has")
    return ops.whole_attention(inputs, ledger, check_name(backend))


@checks.remembered
def _check(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    start: Tensor,
    cursor: Tensor,
    capacity: int,
    scale: Tensor,
    local_out: Tensor | None,
    local_lse: Tensor | None,
    memory_offset: Tensor | None,
) -> None:
    letters = checks.Letters()
    letters.bind("query", query, "B H N D")
    letters.bind("keys", keys, "R slots D")
    letters.bind("values", values, "R slots E")
    checks.few_slots("keys", letters["slots"])
    letters.bind("rows", rows, "B·G")
    letters.bind("start", start, "R")
    letters.bind("cursor", cursor, "R")
    letters.bind("scale", scale, "H")
    checks.groups(letters)
    if (local_out is None) != (local_lse is None):
        raise ValueError("local_out and local_lse must be given together, got one of them")
    for name, tensor, axes in (
        ("local_out", local_out, "B H N E"),
        ("local_lse", local_lse, "B H N"),
        ("memory_offset", memory_offset, "H"),
    ):
        if tensor is not None:
            letters.bind(name, tensor, axes)
    if not 1 <= capacity <= letters["slots"]:
        raise ValueError(f"capacity must be in [1, {letters['slots']}], the slots of a row, got {capacity}")
    floating = {"local_out": local_out, "local_lse": local_lse, "memory_offset": memory_offset}
    checks.floating(query=query, keys=keys, values=values, scale=scale, **floating)
    checks.typed(torch.int64, rows=rows, start=start, cursor=cursor)
    checks.same_device(
        query.device, keys=keys, values=values, rows=rows, start=start, cursor=cursor, scale=scale, **floating
    )
