"""Ring write, search and merge as operators: none of them has a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memtrans_kernels import backends, checks
from memtrans_kernels.eager import is_plain
from memtrans_kernels.precision import arithmetic_dtype

# ------------------------------------------------------------------------------------------------------ ring write


def knn_add_(
    keys: Tensor,
    values: Tensor,
    cursor: Tensor,
    rows: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    count: Tensor | None,
    at: Tensor | None,
    first: Tensor | None,
    backend: str,
) -> None:
    """Writes in place; autograd's version counters count on, whoever writes."""
    arguments = (keys, values, cursor, rows, new_keys, new_values, count, at, first)
    if not is_plain(*arguments):
        return _knn_add_(*arguments, backend)
    backends.run("knn_add_", backend, *arguments)
    torch.autograd.graph.increment_version([t for t in (keys, values, cursor) if not t.is_inference()])


@torch.library.custom_op("memtrans::knn_add_", mutates_args=("keys", "values", "cursor"))
def _knn_add_(
    keys: Tensor,
    values: Tensor,
    cursor: Tensor,
    rows: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    count: Tensor | None = None,
    at: Tensor | None = None,
    first: Tensor | None = None,
    backend: str = "auto",
) -> None:
    for name, tensor in (("keys", keys), ("values", values), ("cursor", cursor)):
        checks.writable(name, tensor)  # again: this operator can be called without `knn_add_`, which asks it
    backends.run("knn_add_", backend, keys, values, cursor, rows, new_keys, new_values, count, at, first)


@_knn_add_.register_fake
def _(*_: Any, **__: Any) -> None:
    return None


# ---------------------------------------------------------------------------------------------------------- search


def knn_search(
    query: Tensor, keys: Tensor, rows: Tensor, start: Tensor, cursor: Tensor, capacity: int, k: int, backend: str
) -> tuple[Tensor, Tensor]:
    """Neither query nor keys may require a gradient."""
    arguments = (query, keys, rows, start, cursor, capacity, k)
    if is_plain(*arguments):
        return backends.run("knn_search", backend, *arguments)
    return _knn_search(*arguments, backend)


@torch.library.custom_op("memtrans::knn_search", mutates_args=())
def _knn_search(
    query: Tensor,
    keys: Tensor,
    rows: Tensor,
    start: Tensor,
    cursor: Tensor,
    capacity: int,
    k: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    return backends.run("knn_search", backend, query, keys, rows, start, cursor, capacity, k)


@_knn_search.register_fake
def _(
    query: Tensor,
    keys: Tensor,
    rows: Tensor,
    start: Tensor,
    cursor: Tensor,
    capacity: int,
    k: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    shape = (*query.shape[:3], k)
    return query.new_empty(shape, dtype=arithmetic_dtype(keys)), query.new_empty(shape, dtype=torch.int32)


# ----------------------------------------------------------------------------------------------------------- merge


def knn_merge(
    scores: Tensor, slots: Tensor, rows: Tensor, total: Tensor, size: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The scores may not require a gradient."""
    arguments = (scores, slots, rows, total, size)
    if is_plain(*arguments):
        return backends.run("knn_merge", backend, *arguments)
    return _knn_merge(*arguments, backend)


@torch.library.custom_op("memtrans::knn_merge", mutates_args=())
def _knn_merge(
    scores: Tensor, slots: Tensor, rows: Tensor, total: Tensor, size: int, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    return backends.run("knn_merge", backend, scores, slots, rows, total, size)


@_knn_merge.register_fake
def _(
    scores: Tensor, slots: Tensor, rows: Tensor, total: Tensor, size: int, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    best = scores.new_empty(scores.shape[1:])
    return best, best.new_empty(best.shape, dtype=torch.int64), slots.new_empty(slots.shape)
