"""Random inputs of the operators, small enough for a test."""

from __future__ import annotations

from typing import Any

import torch

from memtrans_kernels import cosine, knn_add_, knn_search

BATCH, HEADS, GROUPS, LENGTH, CACHED, WIDTH, NEIGHBOURS = 2, 4, 2, 5, 3, 8, 4
LOCAL = CACHED + LENGTH
CAPACITY, SPARE = 11, 6


def ring(dtype: torch.dtype = torch.float32, entries: tuple[int, ...] = (6, 6, 6)) -> dict[str, Any]:
    """A ring of one row more than B·G needs, filled past its end through permuted rows."""
    rows = BATCH * GROUPS + 1
    state = {
        "keys": torch.zeros(rows, CAPACITY + SPARE, WIDTH, dtype=dtype),
        "values": torch.zeros(rows, CAPACITY + SPARE, WIDTH, dtype=dtype),
        "cursor": torch.zeros(rows, dtype=torch.int64),
        "rows": torch.tensor([4, 0, 3, 1]),
    }
    for length in entries:
        new_keys, new_values = torch.randn(2, BATCH, GROUPS, length, WIDTH, dtype=dtype)
        knn_add_(**state, new_keys=new_keys, new_values=new_values)
    return {**state, "start": torch.zeros(rows, dtype=torch.int64)}


def attention_inputs(
    dtype: torch.dtype = torch.float32,
    *,
    entries: tuple[int, ...] = (6, 6, 6),
    bias: str | None = "table",
    offset: bool = True,
    local_length: bool = False,
    neighbours: int = NEIGHBOURS,
) -> dict[str, Any]:
    """Arguments of `memory_attention` with what a search found; floating tensors that have a gradient require it."""
    memory = ring(dtype, entries)
    query, key = cosine(
        torch.randn(BATCH, HEADS, LENGTH, WIDTH, dtype=dtype), torch.randn(BATCH, GROUPS, LOCAL, WIDTH, dtype=dtype)
    )
    scores, slots = knn_search(
        query, memory["keys"], memory["rows"], memory["start"], memory["cursor"], CAPACITY, neighbours
    )
    inputs = {
        "query": query,
        "key": key,
        "value": torch.randn(BATCH, GROUPS, LOCAL, WIDTH, dtype=dtype),
        "memory_keys": memory["keys"],
        "memory_values": memory["values"],
        "rows": memory["rows"],
        "scores": scores,
        "slots": slots,
        "scale": torch.rand(HEADS, dtype=dtype) + 0.5,
    }
    if bias == "table":
        inputs["bias_table"] = torch.randn(HEADS, LOCAL - 2, dtype=dtype)
    if bias == "dense":
        inputs["bias_dense"] = torch.randn(1, HEADS, LENGTH, LOCAL, dtype=dtype)
    if offset:
        inputs["memory_offset"] = torch.randn(HEADS, dtype=dtype)
    if local_length:
        inputs["local_length"] = torch.tensor([LENGTH + 1, LOCAL])
    for name in ("query", "key", "value", "scale", "bias_table", "bias_dense", "memory_offset"):
        if name in inputs:
            inputs[name].requires_grad_()
    return inputs
