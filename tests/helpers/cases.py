"""Random inputs of the operators, small enough for a test."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from helpers.devices import seeded
from torch import Tensor

from memtrans_kernels import cosine, knn_add_, knn_search, memory_attention

DIFFERENTIABLE = ("query", "key", "value", "scale", "bias_table", "bias_dense", "memory_offset", "sink")
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
    for name in DIFFERENTIABLE:
        if name in inputs:
            inputs[name].requires_grad_()
    return inputs


class Shape(NamedTuple):
    """Of one call of `memory_attention`, and what it is given besides query, keys and values."""

    batch: int = 2
    heads: int = 2
    groups: int = 1
    length: int = 5
    local: int = 5
    width: int = 32
    neighbours: int = 5
    distances: int = 0  # of a bias table; none without
    dense: int = 0  # documents of a dense bias; none without
    offset: bool = False
    local_length: bool = False
    dropout_p: float = 0.0
    causal: bool = True
    key_mask: bool = False
    first: bool = False
    soft_cap: float | None = None
    sink: bool = False
    value_width: int = 0  # that of the keys without


# Tiles hold 16 to 64 queries and 32 to 128 keys.
SHAPES = {
    "table inside one tile, groups": Shape(heads=4, groups=2, length=21, local=33, distances=9, offset=True),
    "table over two tiles, masked": Shape(length=40, local=40, width=64, distances=70, local_length=True),
    "dropout": Shape(length=34, local=39, width=96, distances=5, dropout_p=0.3, offset=True),
    "table of one column, one dense bias": Shape(batch=3, length=40, local=75, width=48, distances=1, dense=1),
    "dense bias of every document": Shape(length=37, local=37, width=16, dense=2, local_length=True, dropout_p=0.2),
    "no neighbours at all": Shape(length=34, local=100, neighbours=0, distances=20),
    "no local keys": Shape(local=0, neighbours=9, offset=True),
    "nothing": Shape(local=0, neighbours=0),
    "decoding with a cache": Shape(length=1, local=67, heads=4, width=128, distances=30, offset=True),
    "decoding without": Shape(length=1, local=1, neighbours=20, width=7),
    "decoding, many parts": Shape(
        batch=1, heads=6, groups=2, length=1, local=530, dense=1, local_length=True, offset=True
    ),
    "decoding, many heads": Shape(batch=1, heads=17, length=1, local=70, neighbours=2, distances=30),
    "decoding, no neighbours": Shape(length=1, local=70, neighbours=0, distances=9),
    "decoding, no local keys": Shape(heads=4, groups=2, length=1, local=0, neighbours=9),
    "decoding, nothing": Shape(length=1, local=0, neighbours=0),
    "decoding, dropout": Shape(length=1, local=20, distances=30, dropout_p=0.3),
    "tiles that line up": Shape(heads=4, groups=2, length=64, local=128, width=16, distances=70, local_length=True),
    "tiles that line up, far ones too": Shape(
        length=128, local=192, width=24, neighbours=0, distances=20, dropout_p=0.2, key_mask=True, first=True
    ),
    "table longer than the context, either way": Shape(length=10, local=10, distances=400, causal=False),
    "table and dense bias, hidden tiles": Shape(
        batch=1, length=300, local=300, width=16, neighbours=0, distances=5, dense=1
    ),
    "most neighbours, all heads apart": Shape(batch=1, groups=2, neighbours=128, width=128, distances=3),
}


def random_attention(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Arguments of `memory_attention` over a ring in float16; up to K neighbours of each query are found."""
    batch, heads, groups, length, local, width, neighbours = shape[:7]
    of_values = shape.value_width or width

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    memory_keys, _ = cosine(normal(batch * groups + 1, 40, width), normal(1, width), torch.float16)
    query, key = cosine(normal(batch, length, heads, width).transpose(1, 2), normal(batch, groups, local, width), dtype)
    rows = torch.randperm(batch * groups + 1, generator=generator)[:-1]
    slots = torch.randint(0, 40, (batch, heads, length, neighbours), generator=generator)
    found = torch.randint(0, neighbours + 1, (batch, heads, length, 1), generator=generator)
    slots = torch.where(torch.arange(neighbours) < found, slots, -1).int()
    row = rows.reshape(batch, groups, 1, 1).repeat_interleave(heads // groups, dim=1)
    retrieved = memory_keys[row, slots.long().clamp(min=0)].float()
    scores = (query.float()[:, :, :, None] * retrieved).sum(-1).masked_fill(slots < 0, -torch.inf)
    inputs = {
        "query": query,
        "key": key,
        "value": normal(batch, groups, local, of_values).to(dtype),
        "memory_keys": memory_keys,
        "memory_values": normal(batch * groups + 1, 40, of_values).half(),
        "rows": rows,
        "scores": scores,
        "slots": slots,
        "scale": 3.0 + normal(heads).abs(),
        "bias_table": normal(heads, shape.distances) if shape.distances else None,
        "bias_dense": normal(shape.dense, heads, length, local) if shape.dense else None,
        "memory_offset": normal(heads) if shape.offset else None,
        "local_length": torch.randint(0, local + 1, (batch,), generator=generator) if shape.local_length else None,
        "dropout_p": shape.dropout_p,
        "seed": torch.tensor(2**40 + 5),
    }
    return inputs | _visibility(shape, generator) | {"sink": normal(heads) if shape.sink else None}


def _visibility(shape: Shape, generator: torch.Generator) -> dict[str, Any]:
    """What of the arguments says which local keys are seen, and how."""
    key_mask = torch.rand(shape.batch, shape.local, generator=generator) < 0.7
    position = torch.arange(shape.local - shape.length, shape.local).clamp(min=-1)
    first = (torch.rand(shape.batch, shape.length, generator=generator) * (position + 2)).long()
    return {
        "causal": shape.causal,
        "key_mask": key_mask if shape.key_mask else None,
        "first": first if shape.first else None,
        "soft_cap": shape.soft_cap,
    }


def gradients_of_results(shape: Shape) -> tuple[Tensor, Tensor]:
    """Of out, laid out as merging heads leaves it, and of lse."""
    width = shape.value_width or shape.width
    out = torch.randn(shape.batch, shape.length, shape.heads, width, generator=seeded(1)).transpose(1, 2)
    return out, torch.randn(shape.batch, shape.heads, shape.length, generator=seeded(2))


def attention_gradients(
    inputs: dict[str, Any], grad_out: Tensor, grad_lse: Tensor, backend: str
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """out, lse, and the gradients of both together for every input that has one."""
    leaves = {n: inputs[n].detach().requires_grad_() for n in DIFFERENTIABLE if inputs.get(n) is not None}
    out, lse = memory_attention(**{**inputs, **leaves}, backend=backend)
    torch.autograd.backward((out, lse), (grad_out.to(out.dtype), grad_lse.to(lse.dtype)))
    return out.detach(), lse.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with every floating tensor widened."""
    wide = {
        name: value.double() for name, value in inputs.items() if torch.is_tensor(value) and value.is_floating_point()
    }
    return {**inputs, **wide}
