"""Gradients of memory attention in Triton: one kernel over queries, one over local keys, and those of the bias.

With P the softmax over neighbours and local keys, keep / (1 - p) its dropout, and delta = <grad out, out> - grad lse:

    d logits = P (keep / (1 - p) · <grad out, values> - delta)    d sink = -P_sink delta
    d products = cap'(products) d logits

1. A program per block of queries: their gradient (the neighbours' keys and values are gathered here), delta, and its
   part of the gradients of scale and offset, and of the bias beyond the table's end.
2. Gradients of key and value: `attention_key_gradient`.
3. Gradients of the bias: `attention_bias`.

No two programs write the same number, so there are no atomics and two passes give the same bits. Shapes, limits and
precision: see `memory_attention`; the gradient of the local logits is cast to the query's dtype for matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memtrans_kernels.attention_inputs import AttentionInputs, strides_by_position
from memtrans_kernels.impl.triton import attention_bias, attention_tiles, configs
from memtrans_kernels.impl.triton.attention_key_gradient import key_gradient
from memtrans_kernels.impl.triton.attention_tiles import (
    LOG2E,
    bytes_of,
    capped,
    dropout_constants,
    gather_rows,
    is_near,
    kept,
    keys_until_far,
    laid_out,
    load_denominator,
    load_rows,
    local_tile,
    oldest_key,
    oldest_of_queries,
    packed,
    rows_of,
    strides_of_dense,
    through_cap,
    widths,
)
from memtrans_kernels.impl.triton.launching import launch


@triton.jit
def query_gradient_of_local(
    acc, far_sum, q, grad, denominator, delta, key, value, key_stride, value_stride, end, near, far,
    first_query, m, scale, table, far_bias, dense, dense_strides, mask, oldest, sizes, seed, b, h,
    BOUND: tl.constexpr, CAUSAL: tl.constexpr, CAP: tl.constexpr, NEIGHBOURS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_VALUES: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, THRESHOLD: tl.constexpr, REST: tl.constexpr, TABLE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """sum of d products · key over the local keys [0, end), and what the table's last column gets.

    Keys before `near` and from `far` on are far from all queries. WHOLE: there are as many keys as tiles hold."""
    i = tl.arange(0, BLOCK_KEYS)
    for start in tl.range(0, end, BLOCK_KEYS):
        k = load_rows(key, start + i, sizes[1], key_stride, WIDTH, BLOCK_WIDTH, WHOLE).to(q.dtype)
        v = load_rows(value, start + i, sizes[1], value_stride, VALUE_WIDTH, BLOCK_VALUES, WHOLE).to(q.dtype)
        close = is_near(start, near, far, CAUSAL)
        _, _, grad_logits, grad_products = local_tile(
            q, tl.trans(k), grad, tl.trans(v), denominator[:, None], delta[:, None], first_query, m[:, None], start,
            i[None, :], scale, table, far_bias, dense, dense_strides, mask, oldest, sizes, close, seed, b, h,
            NEIGHBOURS, BOUND, CAUSAL, CAP, THRESHOLD, REST, TABLE,
        )  # fmt: skip
        if table is not None:
            if close:
                ahead = first_query + (sizes[1] - sizes[0]) - start
                if not CAUSAL:
                    distance = tl.abs(ahead + m[:, None] - i[None, :])
                    far_sum += tl.sum(tl.where(distance >= sizes[2] - 1, grad_logits, 0.0), axis=1)
                elif ahead + BLOCK_QUERIES >= sizes[2]:  # the table ends within the tile
                    distance = ahead + m[:, None] - i[None, :]
                    far_sum += tl.sum(tl.where(distance >= sizes[2] - 1, grad_logits, 0.0), axis=1)
            else:
                far_sum += tl.sum(grad_logits, axis=1)
        acc = tl.dot(grad_products.to(q.dtype), k, acc, input_precision="ieee")
    return acc, far_sum


@triton.jit
def query_gradient_of_neighbours(
    acc, scale_sum, offset_sum, grad, denominator, delta, keys, values, key_stride, value_stride, scores, slots, at,
    inside, scale, offset, seed, b, h, n,
    NEIGHBOURS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUES: tl.constexpr, UNROLL: tl.constexpr, CAP: tl.constexpr, THRESHOLD: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """sum of d products · key over the neighbours, one of each query at a time."""
    for k in tl.range(0, NEIGHBOURS, num_stages=1, loop_unroll_factor=UNROLL):
        slot = tl.load(slots + at * NEIGHBOURS + k, mask=inside, other=-1)
        score = tl.load(scores + at * NEIGHBOURS + k, mask=inside, other=0.0)  # beside the slot, not after it
        score = tl.where(slot >= 0, score, 0.0)
        value = gather_rows(values, slot, value_stride, VALUE_WIDTH, BLOCK_VALUES)
        key = gather_rows(keys, slot, key_stride, WIDTH, BLOCK_WIDTH)
        grad_weight = tl.sum(grad * value, axis=1)
        if THRESHOLD > 0:
            grad_weight = tl.where(kept(seed, b, h, n, k + n * 0, THRESHOLD), grad_weight * REST, 0.0)
        weight = tl.where(slot >= 0, tl.exp2(capped(score * scale, CAP) + offset - denominator), 0.0)
        grad_logit = weight * (grad_weight - delta)
        grad_product = through_cap(grad_logit, score * scale, CAP)
        scale_sum += grad_product * score
        offset_sum += grad_logit
        acc += grad_product[:, None] * key
    return acc, scale_sum, offset_sum


@triton.jit
def query_gradient_kernel(
    grad_out, grad_lse, out, lse, query, key, value, memory_keys, memory_values, rows, scores, slots, scale,
    bias_table, bias_dense, memory_offset, local_length, key_mask, first, seed, grad_query, delta, sums,
    heads, groups, length, local_keys, distances, before, span, grad_strides, lse_strides, out_strides,
    query_strides, key_strides, value_strides, memory_key_strides, memory_value_strides, dense_strides,
    grad_query_strides,
    NEIGHBOURS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUES: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, UNROLL: tl.constexpr,
    CAUSAL: tl.constexpr, CAP: tl.constexpr, THRESHOLD: tl.constexpr, REST: tl.constexpr, TABLE: tl.constexpr,
    WHOLE_KEYS: tl.constexpr,
):  # fmt: skip
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(length, BLOCK_QUERIES)
    block, bh = (blocks - 1 - program % blocks).to(tl.int32), program // blocks  # longest first
    b, h = bh // heads, bh % heads
    g = h // (heads // groups)
    n = block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    inside, at = n < length, bh * length + n
    sizes = (length, local_keys, distances)
    factor = tl.load(scale + h).to(tl.float32)
    draw = 0 if seed is None else tl.load(seed)

    grad = load_rows(
        grad_out + b * grad_strides[0] + h * grad_strides[1], n, length, grad_strides[2], VALUE_WIDTH, BLOCK_VALUES
    )  # fmt: skip
    result = load_rows(
        out + b * out_strides[0] + h * out_strides[1], n, length, out_strides[2], VALUE_WIDTH, BLOCK_VALUES
    )  # fmt: skip
    lse_at = b * lse_strides[0] + h * lse_strides[1] + n.to(tl.int64) * lse_strides[2]
    # Products that no addition fuses with: else lanes that add the same two products round them in two ways, and all of
    # them write the sum.
    of_query = tl.sum(tl.fma(grad.to(tl.float32), result.to(tl.float32), 0.0), axis=1)
    of_query -= tl.load(grad_lse + lse_at, mask=inside, other=0.0)
    tl.store(delta + at, of_query, mask=inside)
    denominator = load_denominator(lse, at, inside)

    acc = tl.zeros([BLOCK_QUERIES, BLOCK_WIDTH], tl.float32)
    scale_sum = tl.zeros([BLOCK_QUERIES], tl.float32)
    offset_sum = tl.zeros([BLOCK_QUERIES], tl.float32)
    far_sum = tl.zeros([BLOCK_QUERIES], tl.float32)
    if NEIGHBOURS > 0:
        offset = 0.0 if memory_offset is None else tl.load(memory_offset + h).to(tl.float32) * LOG2E
        row = tl.load(rows + b * groups + g)
        acc, scale_sum, offset_sum = query_gradient_of_neighbours(
            acc, scale_sum, offset_sum, grad.to(tl.float32), denominator, of_query,
            memory_keys + row * memory_key_strides[0], memory_values + row * memory_value_strides[0],
            memory_key_strides[1], memory_value_strides[1], scores, slots, at, inside, factor * LOG2E, offset,
            draw, b, h, n, NEIGHBOURS, WIDTH, BLOCK_WIDTH, VALUE_WIDTH, BLOCK_VALUES, UNROLL, CAP, THRESHOLD, REST,
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
    grad = grad.to(q.dtype)
    of_local, far_sum = query_gradient_of_local(
        tl.zeros([BLOCK_QUERIES, BLOCK_WIDTH], tl.float32), far_sum, q, grad, denominator, of_query, key, value,
        key_strides[2], value_strides[2], far if CAUSAL else local_keys, near, far, block * BLOCK_QUERIES,
        tl.arange(0, BLOCK_QUERIES), factor * LOG2E, bias_table, far_bias, bias_dense, dense_strides[2:], key_mask,
        oldest, sizes, draw, b, h,
        local_length is not None or first is not None, CAUSAL, CAP, NEIGHBOURS, WIDTH, BLOCK_WIDTH, VALUE_WIDTH,
        BLOCK_VALUES, BLOCK_QUERIES, BLOCK_KEYS, THRESHOLD, REST, TABLE, WHOLE_KEYS,
    )  # fmt: skip
    scale_sum += tl.sum(of_local * q.to(tl.float32), axis=1)  # sum of d products · <query, key>
    acc += of_local

    column = tl.arange(0, BLOCK_WIDTH)
    mask = inside[:, None] & (column < WIDTH)[None, :]
    acc = (acc * factor).to(grad_query.dtype.element_ty)
    grad_query += b * grad_query_strides[0] + h * grad_query_strides[1]
    tl.store(grad_query + n.to(tl.int64)[:, None] * grad_query_strides[2] + column[None, :], acc, mask=mask)
    documents_blocks = tl.num_programs(0) // heads
    sums += h * documents_blocks + b * blocks + block  # (3, H, B·blocks)
    tl.store(sums, tl.sum(scale_sum))
    tl.store(sums + heads * documents_blocks, tl.sum(offset_sum))
    tl.store(sums + 2 * heads * documents_blocks, tl.sum(far_sum))


def memory_attention_backward(
    inputs: AttentionInputs, grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, of_keys: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, scale, bias_table, bias_dense, memory_offset, sink; empty where there is none.

    of_keys: whether those of key and value are wanted; else they are empty too.
    """
    batch = inputs.query.shape[0]
    shared = _shared(inputs, rows_of(grad_out), lse)
    grad_query, sums = _query_gradient(inputs, shared, grad_lse, rows_of(out))
    of_scale, of_offset, far = sums.sum(dim=-1)
    table, dense, offset = inputs.bias_table, inputs.bias_dense, inputs.memory_offset
    nothing = inputs.query.new_empty
    near = None if table is None else attention_bias.near_tiles_of(table, batch, shared)
    grad_key, grad_value = nothing(0), nothing(0)
    if of_keys or near is not None:  # the same bits for the table, whether keys have gradients or not
        found = key_gradient(batch, shared, near)
        grad_key, grad_value = found if of_keys else (grad_key, grad_value)
    return (
        grad_query,
        grad_key,
        grad_value,
        of_scale.to(inputs.scale.dtype, copy=offset is not None),  # outputs must not share storage
        nothing(0) if table is None else attention_bias.grad_table(table, far, batch, shared, near),
        nothing(0) if dense is None else attention_bias.grad_dense(dense, batch, shared),
        nothing(0) if offset is None else of_offset.to(offset.dtype, copy=True),
        nothing(0) if inputs.sink is None else _grad_sink(inputs.sink, shared),
    )


def _grad_sink(sink: Tensor, shared: dict[str, Any]) -> Tensor:
    """Of what weighs exp(sink - lse) and is worth nothing, (H,)."""
    weight = (sink.float()[:, None] - shared["lse"].masked_fill(shared["lse"] == -torch.inf, 0.0)).exp()  # (B, H, N)
    return -(weight * shared["delta"]).sum(dim=(0, 2)).to(sink.dtype)


def _shared(inputs: AttentionInputs, grad_out: Tensor, lse: Tensor) -> dict[str, Any]:
    """What all kernels of the backward pass are given."""
    query, key, value = rows_of(inputs.query), rows_of(inputs.key), rows_of(inputs.value)
    batch, heads, length, _ = query.shape
    return {
        "grad_out": grad_out, "lse": packed(lse), "query": query, "key": key, "value": value,
        "scale": packed(inputs.scale), **laid_out(inputs)._asdict(), "bias_dense": inputs.bias_dense,
        "local_length": packed(inputs.local_length), "key_mask": bytes_of(inputs.key_mask),
        "first": packed(inputs.first), "seed": inputs.seed if inputs.dropout_p > 0.0 else None,
        "delta": query.new_empty(batch, heads, length, dtype=torch.float32),
        "heads": heads, "groups": key.shape[1], "length": length, "local_keys": key.shape[2],
        "distances": inputs.distances,
        "grad_strides": grad_out.stride()[:3], "query_strides": query.stride()[:3], "key_strides": key.stride()[:3],
        "value_strides": value.stride()[:3], "dense_strides": strides_of_dense(inputs.bias_dense),
        "NEIGHBOURS": inputs.neighbours, "CAUSAL": inputs.causal, "CAP": inputs.soft_cap or 0.0, **widths(inputs),
        **dropout_constants(inputs.dropout_p),
    }  # fmt: skip


def _query_gradient(
    inputs: AttentionInputs, shared: dict[str, Any], grad_lse: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of query, and parts of those of scale, offset and the farthest bias, (3, H, parts); fills delta."""
    query, length = shared["query"], shared["length"]
    batch, heads = query.shape[:2]
    target = attention_tiles.target_of(query.device)
    config = configs.attention_query_gradient(target, query.dtype.itemsize, inputs.widest, length, inputs.neighbours)
    blocks = configs.blocks_of(length, config.queries)
    memory_keys, memory_values = rows_of(inputs.memory_keys), rows_of(inputs.memory_values)
    grad_query = query.new_empty_strided(query.shape, strides_by_position(query.shape))
    sums = query.new_empty(3, heads, batch * blocks, dtype=torch.float32)
    if sums.numel():
        arguments = {
            **shared, "grad_lse": grad_lse, "out": out, "memory_keys": memory_keys, "memory_values": memory_values,
            "rows": packed(inputs.rows), "scores": packed(inputs.scores), "slots": packed(inputs.slots),
            "memory_offset": packed(inputs.memory_offset), "grad_query": grad_query, "sums": sums,
            "lse_strides": grad_lse.stride(), "out_strides": out.stride()[:3],
            "grad_query_strides": grad_query.stride()[:3],
            "memory_key_strides": memory_keys.stride()[:2], "memory_value_strides": memory_values.stride()[:2],
            "BLOCK_QUERIES": config.queries, "BLOCK_KEYS": config.keys, "UNROLL": config.unroll,
            "WHOLE_KEYS": shared["local_keys"] % config.keys == 0,
        }  # fmt: skip
        grid = (batch * heads * blocks,)
        launch(query_gradient_kernel, grid, arguments, num_warps=config.warps, num_stages=config.stages)
    return grad_query, sums
