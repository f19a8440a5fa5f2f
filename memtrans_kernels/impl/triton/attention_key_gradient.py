"""Gradients of local keys and values in Triton.

    d key = scale · (d products)ᵀ · query    d value = (weights after dropout)ᵀ · grad out

A program owns a block of local keys, and goes over all queries of the heads that share them. Where that would be few
programs, which moreover see fewer queries the later their keys stand, several share the heads of a block: each writes a
part in float32, and a kernel adds them up. On the way d logits of tiles near the diagonal are left for the gradient of
a bias by distance. No atomics, so two passes give the same bits.

Formula, shapes, limits and precision: see `memory_attention_backward`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memtrans_kernels.impl.triton import attention_tiles, configs
from memtrans_kernels.impl.triton.attention_tiles import (
    LOG2E,
    load_denominator,
    load_rows,
    local_tile,
    oldest_key,
    oldest_of_queries,
)
from memtrans_kernels.impl.triton.launching import launch


class NearTiles(NamedTuple):
    """What the gradient of a bias by distance is summed from: d logits near the diagonal, by blocks of queries.

    A place is how many blocks the keys of a tile lie behind its queries.
    """

    tiles: Tensor  # (B, H, blocks, places, keys, queries)

    @property
    def places(self) -> int:
        return self.tiles.shape[3]


@triton.jit
def store_rows(matrix, rows, place, inside, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Writes rows (len(place), BLOCK_WIDTH) to their places in a matrix."""
    column = tl.arange(0, BLOCK_WIDTH)
    mask = inside[:, None] & (column < WIDTH)[None, :]
    tl.store(matrix + place[:, None] * WIDTH + column[None, :], rows.to(matrix.dtype.element_ty), mask=mask)


@triton.jit
def store_near_tile(
    tiles, grad_logits, start, first_key, sizes, places, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr
):  # fmt: skip
    """Writes a tile's d logits (keys, queries) of a head to its place, see `NearTiles`, if the table reaches so far."""
    block = start // BLOCK_KEYS
    place = block + (sizes[1] - sizes[0] - first_key) // BLOCK_KEYS
    if place < places:
        at = tiles + (block * places + place).to(tl.int64) * (BLOCK_KEYS * BLOCK_KEYS) + start % BLOCK_KEYS
        key, query = tl.arange(0, BLOCK_KEYS)[:, None] * BLOCK_KEYS, tl.arange(0, BLOCK_QUERIES)[None, :]
        tl.store(at + key + query, grad_logits.to(tiles.dtype.element_ty))


@triton.jit
def key_gradient_of_head(
    grad_k, grad_v, k, v, query, grad_out, lse, delta, query_stride, grad_stride, begin, near, far, first_key, tiles,
    places, scale, table, far_bias, dense, dense_strides, mask, first, oldest, sizes, seed, b, h, BOUND: tl.constexpr,
    CAUSAL: tl.constexpr, CAP: tl.constexpr, NEIGHBOURS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, BLOCK_VALUES: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    THRESHOLD: tl.constexpr, REST: tl.constexpr, TABLE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Adds the queries of one head from `begin` on to the gradients of a block of keys and values.

    Queries before `near` and from `far` on are far from all of the keys. WHOLE: tiles hold as many queries.
    """
    m, i = tl.arange(0, BLOCK_QUERIES), tl.arange(0, BLOCK_KEYS)
    for start in tl.range(begin, sizes[0], BLOCK_QUERIES):
        n = start + m
        q = load_rows(query, n, sizes[0], query_stride, WIDTH, BLOCK_WIDTH, WHOLE)
        grad = load_rows(grad_out, n, sizes[0], grad_stride, VALUE_WIDTH, BLOCK_VALUES, WHOLE).to(q.dtype)
        denominator = load_denominator(lse, n, n < sizes[0])
        of_query = tl.load(delta + n, mask=n < sizes[0], other=0.0)
        of_tile = oldest
        if first is not None:
            of_tile = oldest_of_queries(first, oldest, b, n, sizes[0])[None, :]
        close = (start >= near) & (start < far)
        _, weights, grad_logits, grad_products = local_tile(
            k, tl.trans(q), v, tl.trans(grad), denominator[None, :], of_query[None, :], start, m[None, :], first_key,
            i[:, None], scale * LOG2E, table, far_bias, dense, dense_strides, mask, of_tile, sizes, close, seed, b, h,
            NEIGHBOURS, BOUND, CAUSAL, CAP, THRESHOLD, REST, TABLE,
        )  # fmt: skip
        if tiles is not None:
            store_near_tile(tiles, grad_logits, start, first_key, sizes, places, BLOCK_QUERIES, BLOCK_KEYS)
        grad_v = tl.dot(weights.to(q.dtype), grad, grad_v, input_precision="ieee")
        grad_k = tl.dot((grad_products * scale).to(q.dtype), q, grad_k, input_precision="ieee")
    return grad_k, grad_v


@triton.jit
def key_gradient_kernel(
    grad_out, lse, delta, query, key, value, scale, bias_table, bias_dense, local_length, key_mask, first, seed,
    near_tiles, places, grad_key, grad_value, batch, heads, groups, length, local_keys, distances, before, span,
    grad_strides, query_strides, key_strides, value_strides, dense_strides,
    NEIGHBOURS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUES: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, CAUSAL: tl.constexpr,
    CAP: tl.constexpr, THRESHOLD: tl.constexpr, REST: tl.constexpr, TABLE: tl.constexpr, WHOLE_QUERIES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    block, bg = (program // (batch * groups)).to(tl.int32), program % (batch * groups)  # most queries first
    b, g = bg // groups, bg % groups
    j = block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    sizes = (length, local_keys, distances)
    draw = 0 if seed is None else tl.load(seed)
    k = load_rows(
        key + b * key_strides[0] + g * key_strides[1], j, local_keys, key_strides[2], WIDTH, BLOCK_WIDTH
    ).to(query.dtype.element_ty)  # fmt: skip
    v = load_rows(
        value + b * value_strides[0] + g * value_strides[1], j, local_keys, value_strides[2], VALUE_WIDTH, BLOCK_VALUES
    ).to(query.dtype.element_ty)  # fmt: skip
    if key_mask is not None:
        key_mask += b * local_keys
    oldest = oldest_key(local_length, b, local_keys)
    grad_k = tl.zeros([BLOCK_KEYS, BLOCK_WIDTH], tl.float32)
    grad_v = tl.zeros([BLOCK_KEYS, BLOCK_VALUES], tl.float32)
    seen = block * BLOCK_KEYS - (local_keys - length)  # the query that stands at the first of these keys
    if CAUSAL:  # no earlier one sees it; else those before `near` are far from all of these keys
        near = tl.maximum(seen, 0) // BLOCK_QUERIES * BLOCK_QUERIES
    else:
        near = tl.minimum(tl.maximum(seen - distances + 2, 0), length) // BLOCK_QUERIES * BLOCK_QUERIES
    far = tl.maximum(seen + BLOCK_KEYS + distances - 2, 0)  # from here on all keys are far from all queries
    far = tl.minimum(tl.cdiv(far, BLOCK_QUERIES) * BLOCK_QUERIES, length)
    each = tl.cdiv(heads // groups, tl.num_programs(1))  # heads of a part
    part = tl.program_id(1).to(tl.int64)
    for head in tl.range(part * each, tl.minimum(part * each + each, heads // groups)):
        h = g * (heads // groups) + head
        factor = tl.load(scale + h).to(tl.float32)
        of_head = query + b * query_strides[0] + h * query_strides[1]
        grad_of_head = grad_out + b * grad_strides[0] + h * grad_strides[1]
        at = (b * heads + h) * length
        table = None if bias_table is None else bias_table + (h * span + before)
        tiles = None
        if near_tiles is not None:
            of_head_and_place = tl.cdiv(length, BLOCK_KEYS) * places * (BLOCK_KEYS * BLOCK_KEYS)
            tiles = near_tiles + (b * heads + h) * of_head_and_place
        far_bias = 0.0 if bias_table is None else tl.load(table + distances - 1)
        dense = None if bias_dense is None else bias_dense + b * dense_strides[0] + h * dense_strides[1]
        grad_k, grad_v = key_gradient_of_head(
            grad_k, grad_v, k, v, of_head, grad_of_head, lse + at, delta + at, query_strides[2], grad_strides[2],
            near if CAUSAL else 0, near, far, block * BLOCK_KEYS, tiles, places, factor, table, far_bias, dense,
            dense_strides[2:], key_mask, first, oldest, sizes, draw, b, h,
            local_length is not None or first is not None, CAUSAL, CAP, NEIGHBOURS, WIDTH, BLOCK_WIDTH, VALUE_WIDTH,
            BLOCK_VALUES, BLOCK_QUERIES, BLOCK_KEYS, THRESHOLD, REST, TABLE, WHOLE_QUERIES,
        )  # fmt: skip
    place = (part * batch * groups + bg) * local_keys + j
    store_rows(grad_key, grad_k, place, j < local_keys, WIDTH, BLOCK_WIDTH)
    store_rows(grad_value, grad_v, place, j < local_keys, VALUE_WIDTH, BLOCK_VALUES)


@triton.jit
def add_parts(written, grad, at, numbers, PARTS: tl.constexpr):
    """Adds up numbers `at` of the parts (PARTS, numbers) of a gradient."""
    total = tl.load(written + at, mask=at < numbers, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(written + part * numbers + at, mask=at < numbers, other=0.0)
    tl.store(grad + at, total.to(grad.dtype.element_ty), mask=at < numbers)


@triton.jit
def add_parts_kernel(
    key_parts, value_parts, grad_key, grad_value, keys, values, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(1) == 0:
        add_parts(key_parts, grad_key, at, keys, PARTS)
    else:
        add_parts(value_parts, grad_value, at, values, PARTS)


def launch_of(shared: dict[str, Any]) -> configs.AttentionLaunch:
    """Of the kernel over local keys."""
    query, width = shared["query"], max(shared["WIDTH"], shared["VALUE_WIDTH"])
    return configs.attention_key_gradient(attention_tiles.target_of(query.device), query.dtype.itemsize, width)


def key_gradient(batch: int, shared: dict[str, Any], near: NearTiles | None) -> tuple[Tensor, Tensor]:
    """Gradients of key (B, G, L, D) and value (B, G, L, E).

    shared: the arguments that all kernels of the backward pass have in common. near: filled on the way.
    """
    key, value = shared["key"], shared["value"]
    config = launch_of(shared)
    programs = configs.blocks_of(shared["local_keys"], config.keys) * batch * shared["groups"]
    if programs == 0:
        return key.new_zeros(key.shape), value.new_zeros(value.shape)
    parts = configs.head_parts(programs, shared["heads"] // shared["groups"])
    grads = [like.new_empty(like.shape) for like in (key, value)]
    written = grads
    if parts > 1:
        written = [like.new_empty(parts, *like.shape, dtype=torch.float32) for like in grads]
    arguments = {
        **shared, "near_tiles": None if near is None else near.tiles, "places": 0 if near is None else near.places,
        "grad_key": written[0], "grad_value": written[1], "batch": batch, "BLOCK_QUERIES": config.queries,
        "BLOCK_KEYS": config.keys, "WHOLE_QUERIES": shared["length"] % config.queries == 0,
    }  # fmt: skip
    launch(key_gradient_kernel, (programs, parts), arguments, num_warps=config.warps, num_stages=config.stages)
    if parts > 1:
        _add_parts(written, grads, parts)
    return grads[0], grads[1]


def _add_parts(written: list[Tensor], grads: list[Tensor], parts: int) -> None:
    keys, values = (grad.numel() for grad in grads)
    arguments = {
        "key_parts": written[0], "value_parts": written[1], "grad_key": grads[0], "grad_value": grads[1], "keys": keys,
        "values": values, "PARTS": parts, "BLOCK": 1024,
    }  # fmt: skip
    launch(add_parts_kernel, (configs.blocks_of(max(keys, values), 1024), 2), arguments, num_warps=4)
