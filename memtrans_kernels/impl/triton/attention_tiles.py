"""What the forward and the backward kernels of `memory_attention` share: loads, local logits and dropout of one tile.

Logits are in units of ln 2 throughout (multiplied by log2 e), so that a softmax takes exp2. A tile's queries `n` and
local keys `j` are indices that broadcast against each other, so that it may as well stand transposed. Source: Wu et
al. 2022, section 3.1; tiles after Dao et al. 2022 (arXiv 2205.14135).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memtrans_kernels.attention_inputs import AttentionInputs
from memtrans_kernels.impl.triton import configs
from memtrans_kernels.impl.triton.launching import launch
from memtrans_kernels.impl.triton.targets import target_of

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# How a tile gets its biases by distance: from the table as it is, or laid out, by a load or by an instruction.
AS_IT_IS, BY_LOAD, BY_ASSEMBLY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def load_rows(base, row, end, stride, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, WHOLE: tl.constexpr = False):
    """Rows `row` of a matrix, zeros outside [0, end); (len(row), BLOCK_WIDTH). WHOLE: none of them is outside."""
    column = tl.arange(0, BLOCK_WIDTH)
    at = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    if not WHOLE:
        return tl.load(at, mask=((row >= 0) & (row < end))[:, None] & (column < WIDTH)[None, :], other=0.0)
    elif WIDTH < BLOCK_WIDTH:
        return tl.load(at, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def gather_rows(base, slot, stride, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Ring entries `slot` in float32, zeros where it is -1; (len(slot), BLOCK_WIDTH).

    They are read once, so they stay out of the first-level cache, which holds the slots and scores of the next ones.
    """
    column = tl.arange(0, BLOCK_WIDTH)
    mask = (slot >= 0)[:, None] & (column < WIDTH)[None, :]
    place = base + slot.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(place, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)


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
def oldest_of_queries(first, oldest, b, n, length):
    """The first local key that each of queries `n` sees, none of another document's."""
    of_query = tl.load(first + b * length + n, mask=n < length, other=0).to(tl.int32)
    return tl.maximum(of_query, oldest)


@triton.jit
def keys_until_far(first_far, local_keys, BLOCK_KEYS: tl.constexpr):
    """Where tiles begin whose keys, at `first_far` or behind it, are as far from all queries of a block as the bias by
    distance tells apart."""
    return tl.minimum(tl.cdiv(tl.maximum(first_far, 0), BLOCK_KEYS) * BLOCK_KEYS, local_keys)


@triton.jit
def is_near(start, near, far, CAUSAL: tl.constexpr):
    """Whether the tile at `start` lies in [near, far)."""
    if CAUSAL:
        return start >= near
    else:
        return (start >= near) & (start < far)


@triton.jit
def tanh(x):
    """To within 2e-7 relative to it: near 0 by an odd polynomial, fitted to the least relative error."""
    size, square = tl.abs(x), x * x
    series = square * -0.005895043258 + 0.02079586685
    series = series * square - 0.05378379673
    series = series * square + 0.1333192437
    series = series * square - 0.3333329856
    far = 1.0 - 2.0 / (tl.exp2(tl.where(size > 10.0, 10.0, size) * (2.0 * LOG2E)) + 1.0)
    return tl.where(size < 0.6, x + x * (series * square), tl.where(x < 0.0, -far, far))


@triton.jit
def capped(logits, CAP: tl.constexpr):
    """What a soft cap leaves of logits without a bias; they are in units of ln 2, CAP is not. 0: none."""
    if CAP > 0.0:
        return tanh(logits * (LN2 / CAP)) * (CAP * LOG2E)
    else:
        return logits


@triton.jit
def through_cap(grad_logits, logits, CAP: tl.constexpr):
    """The gradient of logits without a bias, from that of what a soft cap leaves of them."""
    if CAP > 0.0:
        bent = tanh(logits * (LN2 / CAP))
        return grad_logits * (1.0 - bent * bent)
    else:
        return grad_logits


@triton.jit
def load_mask(mask, j, local_keys):
    """Which local keys `j` are real. Asked for before a tile's product, it comes meanwhile."""
    return tl.load(mask + j, mask=(j < local_keys) & (j >= 0), other=0) != 0


@triton.jit
def biases_of_tile(table, ahead, m, i, TABLE: tl.constexpr):
    """Those of queries m and keys i of a tile, whose first query stands `ahead` of its first key; `table` is laid out.

    An address is a number of the tile, one of the thread and a constant, in 64 bits so that the compiler may add the
    constant last: then it is a part of the instruction. A load by itself would be laid out anew for the tile.
    """
    at = (table + ahead + m.to(tl.int64)) - i.to(tl.int64)
    if TABLE == BY_ASSEMBLY:
        return tl.inline_asm_elementwise("ld.global.nc.f32 $0, [$1];", "=f,l", [at], tl.float32, is_pure=True, pack=1)
    else:
        return tl.load(at)


@triton.jit
def bias_by_distance(dot, table, far_bias, ahead, m, i, distances, near, TABLE: tl.constexpr):
    """Of a tile of the shape of `dot`, in units of ln 2; 0 without a table."""
    if table is None:
        return 0.0
    elif TABLE == AS_IT_IS:
        return tl.load(table + tl.minimum(tl.maximum(ahead + m - i, 0), distances - 1)).to(tl.float32) * LOG2E
    else:
        bias = tl.zeros(dot.shape, tl.float32) + far_bias
        if near:
            bias = biases_of_tile(table, ahead, m, i, TABLE)
        return bias


@triton.jit
def with_bias(dot, scale, bias, CAP: tl.constexpr):
    """cap(scale · dot) + bias"""
    if CAP > 0.0:
        return capped(dot * scale, CAP) + bias
    else:
        return tl.fma(dot, scale, bias)


@triton.jit
def local_logits(
    dot, first_query, m, first_key, i, scale, table, far_bias, dense, dense_strides, seen, oldest, sizes, near,
    BOUND: tl.constexpr, CAUSAL: tl.constexpr, CAP: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """scale · dot + bias of a tile, -inf where a query must not look at a key; `scale` is in units of ln 2.

    m, i: the tile's queries and keys, counted from its first ones. table: laid out or not. far_bias: its last column.
    near: some of the tile's distances are negative or inside the bias table. seen: which keys are real, None for all.
    BOUND: `oldest` counts.
    """
    length, local_keys, distances = sizes
    ahead = first_query + (local_keys - length) - first_key
    j = first_key + i
    bias = bias_by_distance(dot, table, far_bias, ahead, m, i, distances, near, TABLE)
    logits = with_bias(dot, scale, bias, CAP)
    if dense is not None:
        n = first_query + m
        inside = (n < length) & (j < local_keys) & (j >= 0)
        at = n.to(tl.int64) * dense_strides[0] + j.to(tl.int64) * dense_strides[1]
        logits += tl.load(dense + at, mask=inside, other=0.0).to(tl.float32) * LOG2E
    if TABLE == AS_IT_IS:  # what is hidden may be anything, up to here
        logits = tl.where((ahead + m - i >= 0) & (j < local_keys), logits, float("-inf"))
    elif CAUSAL:  # noqa: SIM102  the first is known to the compiler, the second is not
        if near:
            seen_by_order = ahead + m - i >= 0 if table is None else bias != float("-inf")
            logits = tl.where(seen_by_order, logits, float("-inf"))
    if not CAUSAL and seen is None:  # what is not there is not seen either
        logits = tl.where((j < local_keys) & (j >= 0), logits, float("-inf"))
    if seen is not None:  # noqa: SIM102
        if tl.min(seen.to(tl.int32)) == 0:  # most tiles of padded documents are real throughout
            logits = tl.where(seen, logits, float("-inf"))
    if BOUND:
        logits = tl.where(j >= oldest, logits, float("-inf"))
    return logits


@triton.jit
def local_tile(
    q, k, grad, v, denominator, delta, first_query, m, first_key, i, scale, table, far_bias, dense, dense_strides, mask,
    oldest, sizes, near, seed, b, h, neighbours, BOUND: tl.constexpr, CAUSAL: tl.constexpr, CAP: tl.constexpr,
    THRESHOLD: tl.constexpr, REST: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """Recomputes a tile for the backward pass: <q, k>, the weights after dropout, and the gradients of the logits and
    of the products, scale times <q, k>, in them.

    The tile has the shape of dot(q, k): queries first if `q` and `grad` are rows and `k` and `v` columns, or the other
    way round with the two pairs exchanged.
    """
    seen = None if mask is None else load_mask(mask, first_key + i, sizes[1])
    dot = tl.dot(q, k, input_precision="ieee")
    logits = local_logits(
        dot, first_query, m, first_key, i, scale, table, far_bias, dense, dense_strides, seen, oldest, sizes, near,
        BOUND, CAUSAL, CAP, TABLE,
    )  # fmt: skip
    weights = tl.exp2(logits - denominator)
    grad_weights = tl.dot(grad, v, input_precision="ieee")
    dropped = weights
    if THRESHOLD > 0:
        keep = kept(seed, b, h, first_query + m, neighbours + first_key + i, THRESHOLD)
        dropped = tl.where(keep, weights * REST, 0.0)
        grad_weights = tl.where(keep, grad_weights * REST, 0.0)
    grad_logits = weights * (grad_weights - delta)
    return dot, dropped, grad_logits, through_cap(grad_logits, dot * scale, CAP)


@triton.jit
def load_denominator(lse, at, mask):
    """lse in units of ln 2. Outside the mask infinity, so that all weights are 0; 0 where a query attends to nothing,
    whose logits are all -inf."""
    denominator = tl.load(lse + at, mask=mask, other=float("inf"))
    return tl.where(denominator == float("-inf"), 0.0, denominator) * LOG2E


@triton.jit
def lay_out_kernel(table, laid, distances, before, span, CAUSAL: tl.constexpr, BLOCK: tl.constexpr):
    at, h = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    distance = at - before
    if not CAUSAL:
        distance = tl.abs(distance)
    place = tl.minimum(tl.maximum(distance, 0), distances - 1)
    bias = tl.load(table + h * distances + place).to(tl.float32) * LOG2E
    if CAUSAL:
        bias = tl.where(distance < 0, float("-inf"), bias)
    tl.store(laid + h * span + at, bias, mask=at < span)


class LaidOut(NamedTuple):
    """A bias by distance for every pair of a query and a key that tiles hold; the arguments of kernels."""

    bias_table: Tensor | None  # (H, span), in units of ln 2
    before: int  # entries of negative distances
    span: int
    TABLE: int  # how a tile gets its own


def laid_out(inputs: AttentionInputs) -> LaidOut:
    """The table of bias by distance, from keys that stand behind a query to those before it, which causality hides.

    So a tile computes no address but its own, and compares no distances. Those beyond the table have its last column.
    """
    table, length, local_keys = inputs.bias_table, inputs.query.shape[2], inputs.key.shape[2]
    reads = (BY_ASSEMBLY if target_of(inputs.query.device).vendor == "nvidia" else BY_LOAD).value
    if table is None:
        return LaidOut(None, 0, 0, reads)
    heads, distances = table.shape
    beyond = 2 * configs.LARGEST_TILE
    before = beyond
    if not inputs.causal or inputs.bias_dense is not None:  # the gradient of a dense bias visits hidden tiles too
        before += max(length, distances)  # that of the table as many tiles ahead of a query as behind it
    span = before + max(local_keys, distances) + beyond
    laid = table.new_empty(heads, span, dtype=torch.float32)
    arguments = {
        "table": table.contiguous(), "laid": laid, "distances": distances, "before": before, "span": span,
        "CAUSAL": inputs.causal, "BLOCK": 1024,
    }  # fmt: skip
    launch(lay_out_kernel, (configs.blocks_of(span, 1024), heads), arguments, num_warps=4)
    return LaidOut(laid, before, span, reads)


def rows_of(tensor: Tensor) -> Tensor:
    """The tensor with its last axis contiguous; a copy only where it is not."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def packed(tensor: Tensor | None) -> Tensor | None:
    """The tensor without gaps, as kernels index it; a copy only where it has some."""
    return None if tensor is None else tensor.contiguous()


def bytes_of(mask: Tensor | None) -> Tensor | None:
    """A mask as kernels index it: 0 for what is not seen, without gaps."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def widths(inputs: AttentionInputs) -> dict[str, int]:
    """Of keys and values, and the powers of two that their tiles have."""
    return {
        "WIDTH": inputs.width,
        "BLOCK_WIDTH": configs.block_width(inputs.width),
        "VALUE_WIDTH": inputs.value_width,
        "BLOCK_VALUES": configs.block_width(inputs.value_width),
    }


def dropout_constants(dropout_p: float) -> dict[str, float]:
    """The number below which Philox drops a weight, and what the others are multiplied by."""
    return {"THRESHOLD": int(dropout_p * 2**32), "REST": 1.0 / (1.0 - dropout_p)}


def strides_of_dense(bias_dense: Tensor | None) -> tuple[int, int, int, int]:
    """Strides over document, head, query and key; one bias for all documents stands still over them."""
    if bias_dense is None:
        return 0, 0, 0, 0
    document, head, query, key = bias_dense.stride()
    return (document if bias_dense.shape[0] > 1 else 0), head, query, key
