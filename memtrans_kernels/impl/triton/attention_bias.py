"""Gradient of the relative bias of memory attention in Triton: a table by distance, or dense.

    bias_table (H, distances) · bias_dense (1 or B, H, N, L) -> the same shapes

The gradient of a bias is a sum of gradients of logits. Table: only tiles near the diagonal matter, as all farther
logits belong to the last column, which the kernel over queries has summed. Where tiles line up, the gradient of keys
leaves them; elsewhere they are recomputed here. Those that lie equally far behind their queries are added up over
documents and blocks of queries, and only then along their diagonals. Dense: tiles are recomputed, and those of one
place added up over the documents that share the bias. No atomics.

Limits and precision: see `memory_attention_backward`; sums are float32, of tiles that were left of the query's dtype.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from memtrans_kernels.impl.triton import attention_tiles, configs
from memtrans_kernels.impl.triton.attention_key_gradient import NearTiles, launch_of
from memtrans_kernels.impl.triton.attention_tiles import (
    LOG2E,
    load_denominator,
    load_rows,
    local_tile,
    oldest_key,
    oldest_of_queries,
)
from memtrans_kernels.impl.triton.launching import launch


@triton.jit
def bias_gradient_kernel(
    grad_out, lse, delta, query, key, value, scale, bias_table, bias_dense, local_length, key_mask, first, seed, tiles,
    batch, heads, groups, length, local_keys, distances, before, span, grad_strides, query_strides, key_strides,
    value_strides, dense_strides, parts,
    NEIGHBOURS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUES: tl.constexpr, BLOCK: tl.constexpr, DENSE: tl.constexpr, CAUSAL: tl.constexpr, CAP: tl.constexpr,
    THRESHOLD: tl.constexpr, REST: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """Adds up d logits of all tiles that stand at one place.

    Table: a place is how many blocks the keys lie behind the queries, where it is not causal counted from as many
    blocks before them; `parts` programs share the documents and blocks
    of queries, and tiles is (parts, H, places, BLOCK, BLOCK). Dense: a place is a tile of the bias; `parts` is how many
    documents the bias has, each for itself or one for all; tiles is (parts, H, N, L).
    """
    part, h, place = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(0)
    m = tl.arange(0, BLOCK)
    sizes = (length, local_keys, distances)
    draw = 0 if seed is None else tl.load(seed)
    factor = tl.load(scale + h).to(tl.float32) * LOG2E
    g = h // (heads // groups)
    query_blocks = tl.cdiv(length, BLOCK)
    table = None if bias_table is None else bias_table + h * span + before
    items = batch if DENSE else batch * query_blocks
    each = tl.cdiv(items, parts)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for item in tl.range(part * each, tl.minimum(part * each + each, items)):
        if DENSE:
            b = item
            first_query = place // tl.cdiv(local_keys, BLOCK) * BLOCK
            first_key = place % tl.cdiv(local_keys, BLOCK) * BLOCK
        else:
            b = item // query_blocks
            first_query = (item % query_blocks).to(tl.int32) * BLOCK
            behind = place if CAUSAL else place - (tl.num_programs(0) - 1) // 2
            first_key = first_query + (local_keys - length) - behind * BLOCK
        n, j = first_query + m, first_key + m
        at = (b * heads + h) * length
        q = load_rows(
            query + b * query_strides[0] + h * query_strides[1], n, length, query_strides[2], WIDTH, BLOCK_WIDTH
        )  # fmt: skip
        grad = load_rows(
            grad_out + b * grad_strides[0] + h * grad_strides[1], n, length, grad_strides[2], VALUE_WIDTH, BLOCK_VALUES
        ).to(q.dtype)  # fmt: skip
        k = load_rows(
            key + b * key_strides[0] + g * key_strides[1], j, local_keys, key_strides[2], WIDTH, BLOCK_WIDTH
        ).to(q.dtype)  # fmt: skip
        v = load_rows(
            value + b * value_strides[0] + g * value_strides[1], j, local_keys, value_strides[2], VALUE_WIDTH,
            BLOCK_VALUES,
        ).to(q.dtype)  # fmt: skip
        denominator = load_denominator(lse + at, n, n < length)
        of_query = tl.load(delta + at + n, mask=n < length, other=0.0)
        dense = None if bias_dense is None else bias_dense + b * dense_strides[0] + h * dense_strides[1]
        mask = None if key_mask is None else key_mask + b * local_keys
        oldest = oldest_key(local_length, b, local_keys)
        if first is not None:
            oldest = oldest_of_queries(first, oldest, b, n, length)[:, None]
        _, _, grad_logits, _ = local_tile(
            q, tl.trans(k), grad, tl.trans(v), denominator[:, None], of_query[:, None], first_query, m[:, None],
            first_key, m[None, :], factor, table, 0.0, dense, dense_strides[2:], mask, oldest, sizes, True, draw, b, h,
            NEIGHBOURS, local_length is not None or first is not None, CAUSAL, CAP, THRESHOLD, REST, TABLE,
        )  # fmt: skip
        acc += tl.where(((j >= 0) & (j < local_keys))[None, :], grad_logits, 0.0)
    if DENSE:
        n = place // tl.cdiv(local_keys, BLOCK) * BLOCK + m
        j = place % tl.cdiv(local_keys, BLOCK) * BLOCK + m
        at = ((part * heads + h) * length + n[:, None]) * local_keys + j[None, :]
        inside = (n < length)[:, None] & (j < local_keys)[None, :]
        tl.store(tiles + at, acc.to(tiles.dtype.element_ty), mask=inside)
    else:
        tile = (part * heads + h) * tl.num_programs(0) + place
        tl.store(tiles + tile * BLOCK * BLOCK + m[:, None] * BLOCK + m[None, :], acc)


@triton.jit
def add_near_tiles_kernel(near_tiles, tiles, batch, heads, blocks, blocks_behind, parts, BLOCK: tl.constexpr):
    """Adds up the `NearTiles` of one place; `parts` programs share the documents and blocks of queries.

    The sums are queries by keys, (parts, H, places, BLOCK, BLOCK), as those of `bias_gradient_kernel`.
    """
    part, h, place = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(0)
    places = tl.num_programs(0)
    m = tl.arange(0, BLOCK)
    within = m[:, None] * BLOCK + m[None, :]  # (keys, queries)
    each = tl.cdiv(batch * blocks, parts)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for item in tl.range(part * each, tl.minimum(part * each + each, batch * blocks)):
        b, block = item // blocks, item % blocks
        tile = ((b * heads + h) * blocks + block) * places + place
        there = m * 0 + (block + blocks_behind) >= place  # else the keys would stand before the first one
        acc += tl.load(near_tiles + tile * (BLOCK * BLOCK) + within, mask=there[:, None], other=0.0).to(tl.float32)
    tile = (part * heads + h) * places + place
    tl.store(tiles + tile * (BLOCK * BLOCK) + m[None, :] * BLOCK + m[:, None], acc)


@triton.jit
def diagonal_sums_kernel(
    tiles, far, grad_table, heads, distances, parts, places, BLOCK: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Gradient of one bias by distance: the sum along one diagonal of all tiles (parts, H, places, BLOCK, BLOCK).

    Not causal: the middle one of the places is where keys stand at their queries, and there are two diagonals.
    """
    distance, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if distance == distances - 1:
        tl.store(grad_table + h * distances + distance, tl.load(far + h).to(grad_table.dtype.element_ty))
    else:
        place, below = distance // BLOCK, distance % BLOCK  # the diagonal crosses this tile and the next one
        m = tl.arange(0, BLOCK)
        # In the first tile query m stands this far from key m - below, in the next one from key m + BLOCK - below.
        n = tl.where(m >= below, m - below, m - below + BLOCK)
        at = tl.where(m >= below, 0, BLOCK * BLOCK) + m * BLOCK + n
        part = tl.arange(0, BLOCK_PARTS)
        if not CAUSAL:
            place += (places - 1) // 2
        tile = (part * heads + h) * places + place
        terms = tl.load(tiles + tile[:, None] * BLOCK * BLOCK + at[None, :], mask=(part < parts)[:, None], other=0.0)
        total = tl.sum(terms)
        if not CAUSAL:  # the same tiles mirrored at the middle one; a distance of 0 is on both sides
            at = tl.where(m >= below, 0, -BLOCK * BLOCK) + n * BLOCK + m
            tile = (part * heads + h) * places + places - 1 - place
            mask = (tl.where(part < parts, distance, 0) > 0)[:, None]
            total += tl.sum(tl.load(tiles + tile[:, None] * BLOCK * BLOCK + at[None, :], mask=mask, other=0.0))
        tl.store(grad_table + h * distances + distance, total.to(grad_table.dtype.element_ty))


def _launch_of(shared: dict[str, Any]) -> configs.AttentionLaunch:
    query, width = shared["query"], max(shared["WIDTH"], shared["VALUE_WIDTH"])
    return configs.attention_bias_gradient(attention_tiles.target_of(query.device), query.dtype.itemsize, width)


def _places(distances: int, block: int) -> int:
    """Tiles that the diagonals of a table cross in a row of blocks, the first of keys that stand at their queries."""
    return (distances - 2) // block + 2 if distances > 1 else 0


def near_tiles_of(bias_table: Tensor, batch: int, shared: dict[str, Any]) -> NearTiles | None:
    """What `key_gradient` is to fill for `grad_table`; None to compute tiles again: they do not line up, are too
    many, or all keys are far.

    Its numbers have the dtype of the queries, as in the products that make other gradients.
    """
    query, length, behind = shared["query"], shared["length"], shared["local_keys"] - shared["length"]
    block = _launch_of(shared).queries
    config = launch_of(shared)
    places = _places(bias_table.shape[1], block)
    lines_up = config.keys == block and block % config.queries == 0 and length % block == behind % block == 0
    of_head = length * places * block  # numbers, which the kernel counts in 32 bits: with 64, registers spill
    few = batch * of_head > 0 and places <= configs.NEAR_PLACES and of_head < 2**31
    if not (lines_up and few and shared["CAUSAL"] and behind >= 0):
        return None
    return NearTiles(query.new_empty(batch, shared["heads"], length // block, places, block, block))


def grad_table(bias_table: Tensor, far: Tensor, batch: int, shared: dict[str, Any], near: NearTiles | None) -> Tensor:
    """(H, distances).

    far: (H,), what the last column gets. shared: what the backward kernels have in common. near: d logits of the tiles
    that matter; None computes them here.
    """
    heads, distances = bias_table.shape
    length, local_keys = shared["length"], shared["local_keys"]
    if batch * length * local_keys == 0:
        return bias_table.new_zeros(heads, distances)
    config = _launch_of(shared)
    parts = min(configs.BIAS_PARTS, batch * configs.blocks_of(length, config.queries))
    places = _places(distances, config.queries)
    if places and not shared["CAUSAL"]:
        places = 2 * places - 1
    tiles = far.new_empty(parts, heads, places, config.queries, config.queries)
    if near is not None:
        arguments = {
            "near_tiles": near.tiles, "tiles": tiles, "batch": batch, "heads": heads,
            "blocks": length // config.queries, "blocks_behind": (local_keys - length) // config.queries,
            "parts": parts, "BLOCK": config.queries,
        }  # fmt: skip
        launch(add_near_tiles_kernel, (places, heads, parts), arguments, num_warps=4)
    elif places:
        _add_tiles((places, heads, parts), tiles, batch, parts, False, config, shared)
    grad = bias_table.new_empty(heads, distances)
    arguments = {
        "tiles": tiles, "far": far, "grad_table": grad, "heads": heads, "distances": distances, "parts": parts,
        "places": places, "BLOCK": config.queries, "BLOCK_PARTS": configs.power_of_two(parts),
        "CAUSAL": shared["CAUSAL"],
    }  # fmt: skip
    launch(diagonal_sums_kernel, (distances, heads), arguments, num_warps=4)
    return grad


def grad_dense(bias_dense: Tensor, batch: int, shared: dict[str, Any]) -> Tensor:
    """(1 or B, H, N, L)."""
    documents, heads, length, local_keys = bias_dense.shape
    grad = bias_dense.new_empty(bias_dense.shape)
    config = _launch_of(shared)
    places = configs.blocks_of(length, config.queries) * configs.blocks_of(local_keys, config.queries)
    if grad.numel():
        _add_tiles((places, heads, documents), grad, batch, documents, True, config, shared)
    return grad


def _add_tiles(
    grid: tuple[int, int, int],
    tiles: Tensor,
    batch: int,
    parts: int,
    dense: bool,
    config: configs.AttentionLaunch,
    shared: dict[str, Any],
) -> None:
    arguments = {**shared, "tiles": tiles, "batch": batch, "parts": parts, "BLOCK": config.queries, "DENSE": dense}
    launch(bias_gradient_kernel, grid, arguments, num_warps=config.warps, num_stages=config.stages)
