"""The operators of the namespace `memtrans`: schemas, fakes and gradients.

An operator asks `backends` for its implementation when it runs, not when it is traced: a compiled graph follows
`MEMTRANS_BACKEND` and never bakes in what happened to be installed. Arguments are checked in `api`; kernels check
nothing and know nothing of autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memtrans_kernels import backends
from memtrans_kernels.ledger import check_not_stale
from memtrans_kernels.precision import arithmetic_dtype

# ------------------------------------------------------------------------------------------------------ ring write


@torch.library.custom_op("memtrans::knn_add_", mutates_args=("keys", "values", "cursor"))
def knn_add_(
    keys: Tensor,
    values: Tensor,
    cursor: Tensor,
    rows: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    count: Tensor | None = None,
    at: Tensor | None = None,
    backend: str = "auto",
) -> None:
    arguments = (keys, values, cursor, rows, new_keys, new_values, count, at)
    backends.run("knn_add_", backend, *arguments)


@knn_add_.register_fake
def _(*_: Any, **__: Any) -> None:
    return None


# ---------------------------------------------------------------------------------------------------------- search


@torch.library.custom_op("memtrans::knn_search", mutates_args=())
def knn_search(
    query: Tensor,
    keys: Tensor,
    rows: Tensor,
    start: Tensor,
    cursor: Tensor,
    capacity: int,
    k: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    arguments = (query, keys, rows, start, cursor, capacity, k)
    return backends.run("knn_search", backend, *arguments)


@knn_search.register_fake
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


@torch.library.custom_op("memtrans::knn_merge", mutates_args=())
def knn_merge(
    scores: Tensor, slots: Tensor, rows: Tensor, total: Tensor, size: int, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    return backends.run("knn_merge", backend, scores, slots, rows, total, size)


@knn_merge.register_fake
def _(
    scores: Tensor, slots: Tensor, rows: Tensor, total: Tensor, size: int, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    best = scores.new_empty(scores.shape[1:])
    return best, best.new_empty(best.shape, dtype=torch.int64), slots.new_empty(slots.shape)


# ---------------------------------------------------------------------------------------------------------- cosine


@torch.library.custom_op("memtrans::cosine", mutates_args=())
def cosine(
    query: Tensor, key: Tensor, dtype: torch.dtype | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    return backends.run("cosine", backend, query, key, dtype)


@cosine.register_fake
def _(query: Tensor, key: Tensor, dtype: torch.dtype | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape, dtype=dtype), key.new_empty(key.shape, dtype=dtype)


@torch.library.custom_op("memtrans::cosine_backward", mutates_args=())
def cosine_backward(
    grad_query: Tensor, grad_key: Tensor, query: Tensor, key: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    arguments = (grad_query, grad_key, query, key)
    return backends.run("cosine_backward", backend, *arguments)


@cosine_backward.register_fake
def _(grad_query: Tensor, grad_key: Tensor, query: Tensor, key: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _cosine_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, _, ctx.backend = inputs
    ctx.save_for_backward(query, key)


def _cosine_backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
    return (*cosine_backward(grad_query, grad_key, *ctx.saved_tensors, ctx.backend), None, None)


cosine.register_autograd(_cosine_backward, setup_context=_cosine_setup)


# ------------------------------------------------------------------------------------------------ memory attention


@torch.library.custom_op("memtrans::memory_attention", mutates_args=())
def memory_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_keys: Tensor,
    memory_values: Tensor,
    rows: Tensor,
    scores: Tensor,
    slots: Tensor,
    scale: Tensor,
    bias_table: Tensor | None = None,
    bias_dense: Tensor | None = None,
    memory_offset: Tensor | None = None,
    local_length: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    written: Tensor | None = None,
    ticket: Tensor | None = None,
    spare: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    arguments = (
        query, key, value, memory_keys, memory_values, rows, scores, slots, scale,
        bias_table, bias_dense, memory_offset, local_length, dropout_p, seed,
    )  # fmt: skip
    return backends.run("memory_attention", backend, *arguments)


@memory_attention.register_fake
def _(query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=arithmetic_dtype(query))


@torch.library.custom_op("memtrans::memory_attention_backward", mutates_args=())
def memory_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_keys: Tensor,
    memory_values: Tensor,
    rows: Tensor,
    scores: Tensor,
    slots: Tensor,
    scale: Tensor,
    bias_table: Tensor | None,
    bias_dense: Tensor | None,
    memory_offset: Tensor | None,
    local_length: Tensor | None,
    seed: Tensor | None,
    written: Tensor | None,
    ticket: Tensor | None,
    dropout_p: float,
    spare: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_not_stale(written, ticket, spare)
    arguments = (
        grad_out, grad_lse, out, lse, query, key, value, memory_keys, memory_values, rows, scores, slots, scale,
        bias_table, bias_dense, memory_offset, local_length, dropout_p, seed,
    )  # fmt: skip
    return backends.run("memory_attention_backward", backend, *arguments)


@memory_attention_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_keys: Tensor,
    memory_values: Tensor,
    rows: Tensor,
    scores: Tensor,
    slots: Tensor,
    scale: Tensor,
    bias_table: Tensor | None,
    bias_dense: Tensor | None,
    memory_offset: Tensor | None,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None) -> Tensor:
        return query.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    return (
        like(query), like(key), like(value), like(scale), like(bias_table), like(bias_dense), like(memory_offset),
    )  # fmt: skip


def _memory_attention_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dropout_p, seed, written, ticket, ctx.spare, ctx.backend = inputs
    ctx.save_for_backward(*output, *tensors, seed, written, ticket)


def _memory_attention_backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing unpacks them by recomputing
    bias_table, bias_dense, memory_offset = saved[11:14]
    grads = memory_attention_backward(grad_out, grad_lse, *saved, ctx.dropout_p, ctx.spare, ctx.backend)
    grad_query, grad_key, grad_value, grad_scale, grad_table, grad_dense, grad_offset = grads
    return (
        grad_query, grad_key, grad_value, None, None, None, None, None, grad_scale,
        None if bias_table is None else grad_table,
        None if bias_dense is None else grad_dense,
        None if memory_offset is None else grad_offset,
        None, None, None, None, None, None, None,
    )  # fmt: skip


memory_attention.register_autograd(_memory_attention_backward, setup_context=_memory_attention_setup)
