"""Attention to K retrieved neighbours and to the local context in one softmax, one Triton kernel.

    out = softmax([cap(scale · scores) + offset, cap(scale · q kᵀ) + bias, sink]) · [memory values, values, 0]

    query (B, H, N, D) · key (B, G, L, D) · value (B, G, L, E) · memory_values (R, M + S, E) · rows (B·G,)
    scores, slots (B, H, N, K) · scale, memory_offset, sink (H,) · bias_table (H, distances)
    bias_dense (1 or B, H, N, L) · local_length (B,), key_mask (B, L), first (B, N): which local keys a query sees
    -> out (B, H, N, E), lse (B, H, N)

A program owns a block of queries of one head: it gathers their neighbours' values, a row at a time as these are read
once, and then walks over the local keys. Neither logits nor gathered values are written anywhere. One query a head has,
unless weights are dropped, kernels of its own: see `attention_one_query`.

Source: Wu et al. 2022, section 3.1. Limits: D, E and K at most 256; fp16, bf16 and fp32. Precision: matrix products
take the query's dtype (local keys and values are cast to it, so are the local weights; fp32 is not rounded to tf32) and
accumulate in float32; the retrieved part is float32 throughout, whatever the ring holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memtrans_kernels.attention_inputs import AttentionInputs, strides_by_position
from memtrans_kernels.impl.triton import attention_tiles, configs
from memtrans_kernels.impl.triton.attention_one_query import attend_once
from memtrans_kernels.impl.triton.attention_softmax import (
    attend_to_local,
    attend_to_neighbours,
    retrieved_softmax,
    take_sink,
)
from memtrans_kernels.impl.triton.attention_tiles import (
    LN2,
    LOG2E,
    bytes_of,
    dropout_constants,
    keys_until_far,
    laid_out,
    load_rows,
    oldest_key,
    oldest_of_queries,
    packed,
    rows_of,
    strides_of_dense,
    widths,
)
from memtrans_kernels.impl.triton.launching import launch


@triton.jit
def memory_attention_kernel(
    query, key, value, memory_values, rows, scores, slots, scale, bias_table, bias_dense, memory_offset, local_length,
    seed, key_mask, first, sink, out, lse, heads, groups, length, local_keys, distances,
    before, span, query_strides, key_strides, value_strides, memory_strides, dense_strides, out_strides,
    NEIGHBOURS: tl.constexpr, BLOCK_NEIGHBOURS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, BLOCK_VALUES: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    UNROLL: tl.constexpr, CAUSAL: tl.constexpr, CAP: tl.constexpr, THRESHOLD: tl.constexpr, REST: tl.constexpr,
    TABLE: tl.constexpr, WHOLE: tl.constexpr,
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
    acc = tl.zeros([BLOCK_QUERIES, BLOCK_VALUES], tl.float32)
    if NEIGHBOURS > 0:
        offset = 0.0 if memory_offset is None else tl.load(memory_offset + h).to(tl.float32) * LOG2E
        ring = memory_values + tl.load(rows + b * groups + g) * memory_strides[0]
        peak, total = retrieved_softmax(scores, slots, at, inside, factor, offset, NEIGHBOURS, BLOCK_NEIGHBOURS, CAP)
        acc = attend_to_neighbours(
            acc, ring, scores, slots, at, inside, factor, offset, peak, memory_strides[1], draw, b, h, n,
            NEIGHBOURS, VALUE_WIDTH, BLOCK_VALUES, UNROLL, CAP, THRESHOLD,
        )  # fmt: skip

    q = load_rows(
        query + b * query_strides[0] + h * query_strides[1], n, length, query_strides[2], WIDTH, BLOCK_WIDTH
    )  # fmt: skip
    key += b * key_strides[0] + g * key_strides[1]
    value += b * value_strides[0] + g * value_strides[1]
    far_bias = 0.0
    if bias_table is not None:
        bias_table += h * span + before
        far_bias = tl.load(bias_table + distances - 1)
    if bias_dense is not None:
        bias_dense += b * dense_strides[0] + h * dense_strides[1]
    if key_mask is not None:
        key_mask += b * local_keys
    oldest = oldest_key(local_length, b, local_keys)
    if first is not None:
        oldest = oldest_of_queries(first, oldest, b, n, length)[:, None]
    position = block * BLOCK_QUERIES + (local_keys - length)  # of the first query, among the local keys
    near = tl.maximum(position - distances + 2, 0) // BLOCK_KEYS * BLOCK_KEYS  # all keys before it are far from all
    if CAUSAL:
        far = tl.where(local_keys > 0, tl.minimum(position + BLOCK_QUERIES, local_keys), 0)
    else:
        far = keys_until_far(position + BLOCK_QUERIES + distances - 2, local_keys, BLOCK_KEYS)
    near = tl.minimum(near, far)
    acc, peak, total = attend_to_local(
        acc, peak, total, q, key, value, key_strides[2], value_strides[2], 0, far if CAUSAL else local_keys, near, far,
        block * BLOCK_QUERIES, tl.arange(0, BLOCK_QUERIES), factor, bias_table, far_bias, bias_dense, dense_strides[2:],
        key_mask, oldest, sizes, draw, b, h, local_length is not None or first is not None, CAUSAL, CAP, NEIGHBOURS,
        WIDTH, BLOCK_WIDTH, VALUE_WIDTH, BLOCK_VALUES, BLOCK_KEYS, THRESHOLD, TABLE, WHOLE,
    )  # fmt: skip

    if sink is not None:
        peak, total, shrink = take_sink(sink, peak, total, h)
        acc *= shrink[:, None]
    total = tl.where(total == 0.0, 1.0, total)  # nothing to attend to: out is 0, lse is the peak, -inf
    acc *= (REST / total)[:, None]
    column = tl.arange(0, BLOCK_VALUES)
    mask = inside[:, None] & (column < VALUE_WIDTH)[None, :]
    out += b * out_strides[0] + h * out_strides[1]
    place = n.to(tl.int64)[:, None] * out_strides[2] + column[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + at, (peak + tl.log2(total)) * LN2, mask=inside)


def memory_attention(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """One program per document, head and block of queries; of one query, unless weights are dropped, several."""
    batch, heads, length, _ = inputs.query.shape
    groups, local_keys = inputs.key.shape[1:3]
    neighbours, dropout_p = inputs.neighbours, inputs.dropout_p
    query, key, value = rows_of(inputs.query), rows_of(inputs.key), rows_of(inputs.value)
    memory_values, bias_dense = rows_of(inputs.memory_values), inputs.bias_dense
    shape = batch, heads, length, inputs.value_width
    out = query.new_empty_strided(shape, strides_by_position(shape))
    lse = query.new_empty(batch, heads, length, dtype=torch.float32)
    if length == 1 and dropout_p == 0.0:
        attend_once(inputs._replace(query=query, key=key, value=value, memory_values=memory_values), out, lse)
        return out, lse
    config = configs.attention_forward(
        attention_tiles.target_of(query.device), query.dtype.itemsize, inputs.widest, length, local_keys, neighbours
    )
    programs = batch * heads * configs.blocks_of(length, config.queries)
    if programs:
        arguments = {
            "query": query, "key": key, "value": value, "memory_values": memory_values, "rows": packed(inputs.rows),
            "scores": packed(inputs.scores), "slots": packed(inputs.slots), "scale": packed(inputs.scale),
            **laid_out(inputs)._asdict(), "bias_dense": bias_dense,
            "memory_offset": packed(inputs.memory_offset), "local_length": packed(inputs.local_length),
            "seed": inputs.seed if dropout_p > 0.0 else None, "key_mask": bytes_of(inputs.key_mask),
            "first": packed(inputs.first), "sink": packed(inputs.sink), "out": out, "lse": lse,
            "heads": heads, "groups": groups, "length": length, "local_keys": local_keys,
            "distances": inputs.distances, "query_strides": query.stride()[:3], "key_strides": key.stride()[:3],
            "value_strides": value.stride()[:3], "memory_strides": memory_values.stride()[:2],
            "dense_strides": strides_of_dense(bias_dense), "out_strides": out.stride()[:3], "NEIGHBOURS": neighbours,
            "BLOCK_NEIGHBOURS": configs.neighbours_at_once(neighbours, config.queries),
            "BLOCK_QUERIES": config.queries, "BLOCK_KEYS": config.keys, "UNROLL": config.unroll,
            "CAUSAL": inputs.causal, "CAP": inputs.soft_cap or 0.0,
            "WHOLE": local_keys % config.keys == 0, **widths(inputs), **dropout_constants(dropout_p),
        }  # fmt: skip
        launch(memory_attention_kernel, (programs,), arguments, num_warps=config.warps, num_stages=config.stages)
    return out, lse
