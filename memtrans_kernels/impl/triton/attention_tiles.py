"""What the forward and the backward kernels of `memory_attention` share: loads, local logits and dropout of one tile.

Logits are in units of ln 2 throughout (multiplied by log2 e), so that a softmax takes exp2. A tile's queries `n` and
local keys `j` are indices that broadcast against each other, so that it may as well stand transposed. Source: Wu et
al. 2022, section 3.1; tiles after Dao et al. 2022 (arXiv 2205.14135).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(base, row, end, stride, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Rows `row` of a matrix, zeros outside [0, end); (len(row), BLOCK_WIDTH)."""
    column = tl.arange(0, BLOCK_WIDTH)
    mask = ((row >= 0) & (row < end))[:, None] & (column < WIDTH)[None, :]
    return tl.load(base + row.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def gather_rows(base, slot, stride, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Ring entries `slot` in float32, zeros where it is -1; (len(slot), BLOCK_WIDTH)."""
    column = tl.arange(0, BLOCK_WIDTH)
    mask = (slot >= 0)[:, None] & (column < WIDTH)[None, :]
    rows = tl.load(base + slot.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)
    return rows.to(tl.float32)


@triton.jit
def kept(seed, b, h, n, column, THRESHOLD: tl.constexpr):
    """Which probabilities dropout keeps; `column` counts the K neighbours, then the L local keys."""
    numbers, _, _, _ = tl.philox(seed, column, n, h.to(tl.int32), b.to(tl.int32))
    return numbers >= tl.full([], THRESHOLD, tl.uint32)


@triton.jit
def oldest_key(local_length, b, local_keys):
    """The first local key of this document."""
    if local_length is None:
        return 0
    else:
        return (local_keys - tl.load(local_length + b)).to(tl.int32)


@triton.jit
def local_logits(dot, n, j, scale, table, dense, dense_strides, oldest, sizes, NEAR: tl.constexpr, BOUND: tl.constexpr):
    """scale · dot + bias, -inf where query n must not look at key j; `scale` is in units of ln 2.

    NEAR: some of the tile's distances are negative or inside the bias table. BOUND: `oldest` counts.
    """
    length, local_keys, distances = sizes
    distance = n + (local_keys - length) - j
    logits = dot * scale
    if table is not None:
        if NEAR:
            near = tl.minimum(tl.maximum(distance, 0), distances - 1)
            logits += tl.load(table + near).to(tl.float32) * LOG2E
        else:
            logits += tl.load(table + distances - 1).to(tl.float32) * LOG2E
    if dense is not None:
        inside = (n < length) & (j < local_keys) & (j >= 0)
        at = n.to(tl.int64) * dense_strides[0] + j.to(tl.int64) * dense_strides[1]
        logits += tl.load(dense + at, mask=inside, other=0.0).to(tl.float32) * LOG2E
    if NEAR:
        logits = tl.where((distance >= 0) & (j < local_keys) & (j >= 0), logits, float("-inf"))
    if BOUND:
        logits = tl.where(j >= oldest, logits, float("-inf"))
    return logits


@triton.jit
def local_tile(
    q, k, grad, v, denominator, delta, n, j, scale, table, dense, dense_strides, oldest, sizes,
    seed, b, h, neighbours, NEAR: tl.constexpr, BOUND: tl.constexpr, THRESHOLD: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Recomputes a tile for the backward pass: <q, k>, the weights after dropout, and the gradient of the logits.

    The tile has the shape of dot(q, k): queries first if `q` and `grad` are rows and `k` and `v` columns, or the other
    way round with the two pairs exchanged.
    """
    dot = tl.dot(q, k, input_precision="ieee")
    logits = local_logits(dot, n, j, scale, table, dense, dense_strides, oldest, sizes, NEAR, BOUND)
    weights = tl.exp2(logits - denominator)
    grad_weights = tl.dot(grad, v, input_precision="ieee")
    dropped = weights
    if THRESHOLD > 0:
        keep = kept(seed, b, h, n, neighbours + j, THRESHOLD)
        dropped = tl.where(keep, weights * REST, 0.0)
        grad_weights = tl.where(keep, grad_weights * REST, 0.0)
    return dot, dropped, weights * (grad_weights - delta)


@triton.jit
def load_denominator(lse, at, mask):
    """lse in units of ln 2. Outside the mask infinity, so that all weights are 0; 0 where a query attends to nothing,
    whose logits are all -inf."""
    denominator = tl.load(lse + at, mask=mask, other=float("inf"))
    return tl.where(denominator == float("-inf"), 0.0, denominator) * LOG2E


def rows_of(tensor: Tensor) -> Tensor:
    """The tensor with its last axis contiguous; a copy only where it is not."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def packed(tensor: Tensor | None) -> Tensor | None:
    """The tensor without gaps, as kernels index it; a copy only where it has some."""
    return None if tensor is None else tensor.contiguous()


def dropout_constants(dropout_p: float) -> dict[str, float]:
    """The number below which Philox drops a weight, and what the others are multiplied by."""
    return {"THRESHOLD": int(dropout_p * 2**32), "REST": 1.0 / (1.0 - dropout_p)}


def strides_of_dense(bias_dense: Tensor | None) -> tuple[int, int, int, int]:
    """Strides over document, head, query and key; one bias for all documents stands still over them."""
    if bias_dense is None:
        return 0, 0, 0, 0
    document, head, query, key = bias_dense.stride()
    return (document if bias_dense.shape[0] > 1 else 0), head, query, key
