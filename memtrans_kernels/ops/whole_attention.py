"""Attention to all that a memory holds as an operator: it has no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memtrans_kernels import backends
from memtrans_kernels.attention_inputs import WholeInputs, strides_by_position
from memtrans_kernels.eager import is_plain
from memtrans_kernels.ledger import Ledger, check_not_stale
from memtrans_kernels.ops.attention import by_position
from memtrans_kernels.precision import arithmetic_dtype

Output = tuple[Tensor, Tensor]


def whole_attention(inputs: WholeInputs, ledger: Ledger | None, backend: str) -> Output:
    """No tensor may require a gradient."""
    of_ledger = ledger if ledger is not None else (None, None, 0)
    if is_plain(*inputs):
        check_not_stale(*of_ledger)
        return backends.run("whole_attention", backend, inputs)
    return _whole_attention(*inputs, *of_ledger, backend)


@torch.library.custom_op("memtrans::whole_attention", mutates_args=())
def _whole_attention(
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
    written: Tensor | None = None,
    ticket: Tensor | None = None,
    spare: int = 0,
    backend: str = "auto",
) -> Output:
    check_not_stale(written, ticket, spare)
    given = (query, keys, values, rows, start, cursor, capacity, scale, local_out, local_lse, memory_offset)
    out, lse = backends.run("whole_attention", backend, WholeInputs(*given))
    return by_position(out), lse


@_whole_attention.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> Output:
    shape = (*query.shape[:3], values.shape[2])
    out = query.new_empty_strided(shape, strides_by_position(shape))
    return out, query.new_empty(query.shape[:3], dtype=arithmetic_dtype(query))
