"""Attention to K retrieved neighbours and to the causal local context in one softmax, one Triton kernel.

    out = softmax([scale · scores + offset, scale · q kᵀ + bias]) · [memory values, values]

    query (B, H, N, D) · key, value (B, G, L, D) · memory_values (R, M + S, D) · rows (B·G,)
    scores, slots (B, H, N, K) · scale, memory_offset (H,) · bias_table (H, distances) · bias_dense (1 or B, H, N, L)
    -> out (B, H, N, D), lse (B, H, N)

A program owns a block of queries of one head: it gathers their neighbours' values, a row at a time as these are read
once, and then walks over the local keys. A single query's values are gathered at once: a row at a time would leave most
threads idle. Neither logits nor gathered values are written anywhere.

Source: Wu et al. 2022, section 3.1. Limits: D and K at most 128; fp16, bf16 and fp32. Precision: matrix products take
the query's dtype (local keys and values are cast to it, so are the local weights; fp32 is not rounded to tf32) and
accumulate in float32; the retrieved part is float32 throughout, whatever the ring holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memtrans_kernels import configs
from memtrans_kernels.attention_tiles import (
    LN2,
    LOG2E,
    dropout_constants,
    gather_rows,
    kept,
    load_rows,
    local_logits,
    oldest_key,
    packed,
    rows_of,
    strides_of_dense,
)


@triton.jit
def retrieved_softmax(
    scores, slots, at, inside, scale, offset, NEIGHBOURS: tl.constexpr, BLOCK_NEIGHBOURS: tl.constexpr
):
    """Peak and denominator of the retrieved logits of queries `at`; -inf and 0 where there are none."""
    k = tl.arange(0, BLOCK_NEIGHBOURS)
    entry = at[:, None] * NEIGHBOURS + k[None, :]
    slot = tl.load(slots + entry, mask=inside[:, None] & (k < NEIGHBOURS)[None, :], other=-1)
    score = tl.load(scores + entry, mask=slot >= 0, other=0.0)
    logits = tl.where(slot >= 0, score * scale + offset, float("-inf"))  # (BLOCK, K)
    peak = tl.max(logits, axis=1)
    total = tl.sum(tl.exp2(logits - tl.where(peak == float("-inf"), 0.0, peak)[:, None]), axis=1)
    return peak, total


@triton.jit
def attend_to_neighbours(
    acc, values, scores, slots, at, inside, scale, offset, peak, stride, seed, b, h, n,
    NEIGHBOURS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, UNROLL: tl.constexpr,
    THRESHOLD: tl.constexpr,
):  # fmt: skip
    """Adds the weighted values of the neighbours, one of each query at a time."""
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    for k in tl.range(0, NEIGHBOURS, num_stages=1, loop_unroll_factor=UNROLL):
        slot = tl.load(slots + at * NEIGHBOURS + k, mask=inside, other=-1)
        score = tl.load(scores + at * NEIGHBOURS + k, mask=inside, other=0.0)  # beside the slot, not after it
        weight = tl.where(slot >= 0, tl.exp2(score * scale + offset - peak), 0.0)
        if THRESHOLD > 0:
            weight = tl.where(kept(seed, b, h, n, k + n * 0, THRESHOLD), weight, 0.0)
        acc += weight[:, None] * gather_rows(values, slot, stride, WIDTH, BLOCK_WIDTH)
    return acc


@triton.jit
def attend_to_neighbours_of_one(
    acc, values, scores, slots, first, scale, offset, peak, stride, seed, b, h,
    NEIGHBOURS: tl.constexpr, BLOCK_NEIGHBOURS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    THRESHOLD: tl.constexpr,
):  # fmt: skip
    """The same for a block of one query, whose neighbours start at `first`: all their values are gathered at once."""
    k = tl.arange(0, BLOCK_NEIGHBOURS)
    slot = tl.load(slots + first + k, mask=k < NEIGHBOURS, other=-1)
    score = tl.load(scores + first + k, mask=k < NEIGHBOURS, other=0.0)
    highest = tl.max(peak, axis=0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.where(slot >= 0, tl.exp2(score * scale + offset - highest), 0.0)
    if THRESHOLD > 0:
        weight = tl.where(kept(seed, b, h, k * 0, k, THRESHOLD), weight, 0.0)
    gathered = gather_rows(values, slot, stride, WIDTH, BLOCK_WIDTH)
    return acc + tl.sum(weight[:, None] * gathered, axis=0)[None, :]


@triton.jit
def attend_to_local(
    acc, peak, total, q, key, value, key_stride, value_stride, first, last, n, scale, table, dense, dense_strides,
    oldest, sizes, seed, b, h, NEAR: tl.constexpr, BOUND: tl.constexpr, NEIGHBOURS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_KEYS: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """Adds the local keys [first, last) to a running softmax."""
    for start in tl.range(first, last, BLOCK_KEYS):
        j = start + tl.arange(0, BLOCK_KEYS)
        k = load_rows(key, j, sizes[1], key_stride, WIDTH, BLOCK_WIDTH).to(q.dtype)
        dot = tl.dot(q, tl.trans(k), input_precision="ieee")
        logits = local_logits(
            dot, n[:, None], j[None, :], scale, table, dense, dense_strides, oldest, sizes, NEAR, BOUND
        )  # (BLOCK_QUERIES, BLOCK_KEYS)
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - finite[:, None])
        shrink = tl.exp2(peak - finite)
        total = total * shrink + tl.sum(weights, axis=1)
        if THRESHOLD > 0:
            weights = tl.where(kept(seed, b, h, n[:, None], (NEIGHBOURS + j)[None, :], THRESHOLD), weights, 0.0)
        v = load_rows(value, j, sizes[1], value_stride, WIDTH, BLOCK_WIDTH).to(q.dtype)
        acc = tl.dot(weights.to(q.dtype), v, acc * shrink[:, None], input_precision="ieee")
        peak = higher
    return acc, peak, total


@triton.jit
def memory_attention_kernel(
    query, key, value, memory_values, rows, scores, slots, scale, bias_table, bias_dense, memory_offset, local_length,
    seed, out, lse, heads, groups, length, local_keys, distances,
    query_strides, key_strides, value_strides, memory_strides, dense_strides,
    NEIGHBOURS: tl.constexpr, BLOCK_NEIGHBOURS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, UNROLL: tl.constexpr, ONE_QUERY: tl.constexpr,
    THRESHOLD: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(length, BLOCK_QUERIES)
    block, bh = (blocks - 1 - program % blocks).to(tl.int32), program // blocks  # longest first
    b, h = bh // heads, bh % heads
    g = h // (heads // groups)
    n = block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    inside, at = n < length, bh * length + n
    sizes = (length, local_keys, distances)
    factor = tl.load(scale + h).to(tl.float32) * LOG2E
    draw = 0 if seed is None else tl.load(seed)

    peak = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    acc = tl.zeros([BLOCK_QUERIES, BLOCK_WIDTH], tl.float32)
    if NEIGHBOURS > 0:
        offset = 0.0 if memory_offset is None else tl.load(memory_offset + h).to(tl.float32) * LOG2E
        ring = memory_values + tl.load(rows + b * groups + g) * memory_strides[0]
        peak, total = retrieved_softmax(scores, slots, at, inside, factor, offset, NEIGHBOURS, BLOCK_NEIGHBOURS)
        if ONE_QUERY:
            acc = attend_to_neighbours_of_one(
                acc, ring, scores, slots, bh * NEIGHBOURS, factor, offset, peak, memory_strides[1], draw, b, h,
                NEIGHBOURS, BLOCK_NEIGHBOURS, WIDTH, BLOCK_WIDTH, THRESHOLD,
            )  # fmt: skip
        else:
            acc = attend_to_neighbours(
                acc, ring, scores, slots, at, inside, factor, offset, peak, memory_strides[1], draw, b, h, n,
                NEIGHBOURS, WIDTH, BLOCK_WIDTH, UNROLL, THRESHOLD,
            )  # fmt: skip

    q = load_rows(
        query + b * query_strides[0] + h * query_strides[1], n, length, query_strides[2], WIDTH, BLOCK_WIDTH
    )  # fmt: skip
    key += b * key_strides[0] + g * key_strides[1]
    value += b * value_strides[0] + g * value_strides[1]
    if bias_table is not None:
        bias_table += h * distances
    if bias_dense is not None:
        bias_dense += b * dense_strides[0] + h * dense_strides[1]
    oldest = oldest_key(local_length, b, local_keys)
    position = block * BLOCK_QUERIES + (local_keys - length)  # of the first query, among the local keys
    near = tl.maximum(position - distances + 2, 0) // BLOCK_KEYS * BLOCK_KEYS  # all keys before it are far from all
    end = tl.where(local_keys > 0, tl.minimum(position + BLOCK_QUERIES, local_keys), 0)
    near = tl.minimum(near, end)
    acc, peak, total = attend_to_local(
        acc, peak, total, q, key, value, key_strides[2], value_strides[2], 0, near, n, factor, bias_table, bias_dense,
        dense_strides[2:], oldest, sizes, draw, b, h, False, local_length is not None, NEIGHBOURS,
        WIDTH, BLOCK_WIDTH, BLOCK_KEYS, THRESHOLD,
    )  # fmt: skip
    acc, peak, total = attend_to_local(
        acc, peak, total, q, key, value, key_strides[2], value_strides[2], near, end, n, factor, bias_table, bias_dense,
        dense_strides[2:], oldest, sizes, draw, b, h, True, local_length is not None, NEIGHBOURS,
        WIDTH, BLOCK_WIDTH, BLOCK_KEYS, THRESHOLD,
    )  # fmt: skip

    total = tl.where(total > 0.0, total, 1.0)  # nothing to attend to: out is 0, lse is the peak, -inf
    acc *= (REST / total)[:, None]
    column = tl.arange(0, BLOCK_WIDTH)
    mask = inside[:, None] & (column < WIDTH)[None, :]
    tl.store(out + at[:, None] * WIDTH + column[None, :], acc.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + at, (peak + tl.log2(total)) * LN2, mask=inside)


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
) -> tuple[Tensor, Tensor]:
    """One program per document, head and block of queries."""
    batch, heads, length, width = query.shape
    groups, local_keys, neighbours = key.shape[1], key.shape[2], slots.shape[3]
    query, key, value, memory_values = (rows_of(tensor) for tensor in (query, key, value, memory_values))
    out = query.new_empty(batch, heads, length, width)
    lse = query.new_empty(batch, heads, length, dtype=torch.float32)
    launch = configs.attention_forward(query.dtype.itemsize, width, length, local_keys, neighbours)
    programs = batch * heads * triton.cdiv(length, launch.queries)
    if programs:
        memory_attention_kernel[(programs,)](
            query, key, value, memory_values, packed(rows), packed(scores), packed(slots), packed(scale),
            packed(bias_table), bias_dense, packed(memory_offset), packed(local_length),
            seed if dropout_p > 0.0 else None, out, lse, heads, groups, length, local_keys,
            1 if bias_table is None else bias_table.shape[1],
            query.stride()[:3], key.stride()[:3], value.stride()[:3], memory_values.stride()[:2],
            strides_of_dense(bias_dense),
            NEIGHBOURS=neighbours,
            BLOCK_NEIGHBOURS=configs.power_of_two(neighbours),
            WIDTH=width,
            BLOCK_WIDTH=max(16, configs.power_of_two(width)),
            BLOCK_QUERIES=launch.queries,
            BLOCK_KEYS=launch.keys,
            UNROLL=launch.unroll,
            ONE_QUERY=length == 1,
            num_warps=launch.warps,
            num_stages=launch.stages,
            **dropout_constants(dropout_p),
        )  # fmt: skip
    return out, lse
