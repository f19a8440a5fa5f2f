"""Memory attention of one query a head (decoding) in Triton: neighbours and local keys split over programs.

    out = softmax([scale · scores + offset, scale · q kᵀ + bias]) · [memory values, values]

    query (B, H, 1, D); the rest as in `memory_attention` -> out (B, H, 1, D), lse (B, H, 1)

One program a head would read its document's local keys one tile after the other, and so would all heads that share
them: 256 KB each with L = 1024. Here a program takes some of the local keys of one key/value head, with all query heads
that share it as the rows of its tile; others take the neighbours of one head, all gathered at once. Each leaves its
part of the softmax, out and lse in float32, and a second kernel merges the parts of each head.

    partial (parts + 1, B, H, D) · partial_lse (parts + 1, B, H), in units of ln 2; the last part is the neighbours

Source: Wu et al. 2022, section 3.1; split keys after Flash-Decoding (Dao et al. 2023). Limits and precision: those of
`memory_attention`; no dropout.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from memtrans_kernels import configs
from memtrans_kernels.attention_softmax import attend_to_local
from memtrans_kernels.attention_tiles import LN2, LOG2E, gather_rows, load_rows, oldest_key, strides_of_dense


@triton.jit
def attend_to_all_neighbours(
    values, scores, slots, first, scale, offset, stride,
    NEIGHBOURS: tl.constexpr, BLOCK_NEIGHBOURS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """The softmax state (acc, peak, total) of one query, whose neighbours, from `first` on, are gathered at once."""
    k = tl.arange(0, BLOCK_NEIGHBOURS)
    slot = tl.load(slots + first + k, mask=k < NEIGHBOURS, other=-1)
    score = tl.load(scores + first + k, mask=k < NEIGHBOURS, other=0.0)
    gathered = gather_rows(values, slot, stride, WIDTH, BLOCK_WIDTH)
    logits = tl.where(slot >= 0, score * scale + offset, float("-inf"))
    peak = tl.max(logits, axis=0)
    weights = tl.exp2(logits - tl.where(peak == float("-inf"), 0.0, peak))
    return tl.sum(weights[:, None] * gathered, axis=0), peak, tl.sum(weights, axis=0)


@triton.jit
def neighbours_of_head(
    memory_values, rows, scores, slots, scale, memory_offset, partial, partial_lse, bg, head, at, memory_strides,
    NEIGHBOURS: tl.constexpr, BLOCK_NEIGHBOURS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Leaves the part of one document's head (its number among all is `at`) that is its neighbours."""
    offset = 0.0 if memory_offset is None else tl.load(memory_offset + head).to(tl.float32) * LOG2E
    factor = tl.load(scale + head).to(tl.float32) * LOG2E
    ring = memory_values + tl.load(rows + bg) * memory_strides[0]
    acc, peak, total = attend_to_all_neighbours(
        ring, scores, slots, at * NEIGHBOURS, factor, offset, memory_strides[1],
        NEIGHBOURS, BLOCK_NEIGHBOURS, WIDTH, BLOCK_WIDTH,
    )  # fmt: skip
    total = tl.where(total > 0.0, total, 1.0)
    column = tl.arange(0, BLOCK_WIDTH)
    tl.store(partial + at * WIDTH + column, acc / total, mask=column < WIDTH)
    tl.store(partial_lse + at, peak + tl.log2(total))


@triton.jit
def local_keys_of_group(
    query, key, value, scale, bias_table, bias_dense, local_length, partial, partial_lse, b, g, first, last, sharing,
    at, local_keys, distances, query_strides, key_strides, value_strides, dense_strides,
    NEIGHBOURS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Leaves the part that is keys [first, last), of all heads of a group; the first head is number `at` among all."""
    row = tl.arange(0, BLOCK_HEADS)
    heads = g * sharing + tl.minimum(row, sharing - 1)
    q = load_rows(query + b * query_strides[0], heads, g * sharing + sharing, query_strides[1], WIDTH, BLOCK_WIDTH)
    factor = (tl.load(scale + heads).to(tl.float32) * LOG2E)[:, None]
    if bias_table is not None:
        bias_table += (heads * distances)[:, None]
    if bias_dense is not None:
        bias_dense += b * dense_strides[0] + (heads * dense_strides[1])[:, None]
    acc = tl.zeros([BLOCK_HEADS, BLOCK_WIDTH], tl.float32)
    peak = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    acc, peak, total = attend_to_local(
        acc, peak, tl.zeros([BLOCK_HEADS], tl.float32), q, key + b * key_strides[0] + g * key_strides[1],
        value + b * value_strides[0] + g * value_strides[1], key_strides[2], value_strides[2], first, last,
        tl.zeros([BLOCK_HEADS], tl.int32), factor, bias_table, bias_dense, dense_strides[2:],
        oldest_key(local_length, b, local_keys), (1, local_keys, distances), 0, b, heads, True,
        local_length is not None, NEIGHBOURS, WIDTH, BLOCK_WIDTH, BLOCK_KEYS, 0,
    )  # fmt: skip
    total = tl.where(total > 0.0, total, 1.0)
    column = tl.arange(0, BLOCK_WIDTH)
    mask = (row < sharing)[:, None] & (column < WIDTH)[None, :]
    tl.store(partial + (at + row)[:, None] * WIDTH + column[None, :], acc / total[:, None], mask=mask)
    tl.store(partial_lse + at + row, peak + tl.log2(total), mask=row < sharing)


@triton.jit
def attend_in_parts_kernel(
    query, key, value, memory_values, rows, scores, slots, scale, bias_table, bias_dense, memory_offset, local_length,
    partial, partial_lse, groups, sharing, local_keys, distances, parts, keys_of_part,
    query_strides, key_strides, value_strides, memory_strides, dense_strides,
    NEIGHBOURS: tl.constexpr, BLOCK_NEIGHBOURS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Grid (B·G, parts, and with neighbours H / G more)."""
    bg, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, g = bg // groups, bg % groups
    if part < parts:
        first = part * keys_of_part
        local_keys_of_group(
            query, key, value, scale, bias_table, bias_dense, local_length, partial, partial_lse, b, g, first,
            tl.minimum(first + keys_of_part, local_keys), sharing, (part * tl.num_programs(0) + bg) * sharing,
            local_keys, distances, query_strides, key_strides, value_strides, dense_strides,
            NEIGHBOURS, WIDTH, BLOCK_WIDTH, BLOCK_HEADS, BLOCK_KEYS,
        )  # fmt: skip
    else:
        of_part = tl.num_programs(0).to(tl.int64) * sharing * parts
        neighbours_of_head(
            memory_values, rows, scores, slots, scale, memory_offset, partial + of_part * WIDTH, partial_lse + of_part,
            bg, g * sharing + part - parts, bg * sharing + part - parts, memory_strides,
            NEIGHBOURS, BLOCK_NEIGHBOURS, WIDTH, BLOCK_WIDTH,
        )  # fmt: skip


@triton.jit
def merge_parts_kernel(
    partial, partial_lse, out, lse, parts, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_PARTS: tl.constexpr
):
    """One program per document and head."""
    part, column = tl.arange(0, BLOCK_PARTS), tl.arange(0, BLOCK_WIDTH)
    bh, all_heads = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    at = part * all_heads + bh
    of_part = tl.load(partial_lse + at, mask=part < parts, other=float("-inf"))
    mask = (part < parts)[:, None] & (column < WIDTH)[None, :]
    values = tl.load(partial + at[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
    peak = tl.max(of_part, axis=0)
    weights = tl.exp2(of_part - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(weights, axis=0)
    total = tl.where(total > 0.0, total, 1.0)  # nothing to attend to: out is 0, lse is the peak, -inf
    merged = tl.sum(weights[:, None] * values, axis=0) / total
    tl.store(out + bh * WIDTH + column, merged.to(out.dtype.element_ty), mask=column < WIDTH)
    tl.store(lse + bh, (peak + tl.log2(total)) * LN2)


class Retrieved(NamedTuple):
    """The memory's part of the arguments of `memory_attention`."""

    memory_values: Tensor
    rows: Tensor
    scores: Tensor
    slots: Tensor
    memory_offset: Tensor | None


class Local(NamedTuple):
    """The local context's part."""

    key: Tensor
    value: Tensor
    bias_table: Tensor | None
    bias_dense: Tensor | None
    local_length: Tensor | None


def attend_once(query: Tensor, scale: Tensor, retrieved: Retrieved, local: Local, out: Tensor, lse: Tensor) -> None:
    """Fills out and lse: a launch for the parts, and one that merges them."""
    batch, heads, _, width = query.shape
    groups, local_keys, neighbours = local.key.shape[1], local.key.shape[2], retrieved.slots.shape[3]
    if batch * heads == 0:
        return
    launch = configs.attention_one_query(query.dtype.itemsize, local_keys)
    parts, sharing = triton.cdiv(local_keys, launch.of_part), heads // groups
    all_parts = parts + (1 if neighbours else 0)
    partial = lse.new_empty(all_parts, batch, heads, width)
    partial_lse = lse.new_empty(all_parts, batch, heads)
    block_width = max(16, configs.power_of_two(width))
    if all_parts:
        attend_in_parts_kernel[(batch * groups, parts + (sharing if neighbours else 0))](
            query, local.key, local.value, *retrieved[:4], scale, local.bias_table, local.bias_dense,
            retrieved.memory_offset, local.local_length, partial, partial_lse, groups, sharing, local_keys,
            1 if local.bias_table is None else local.bias_table.shape[1], parts, launch.of_part,
            query.stride()[:3], local.key.stride()[:3], local.value.stride()[:3],
            retrieved.memory_values.stride()[:2], strides_of_dense(local.bias_dense),
            NEIGHBOURS=neighbours,
            BLOCK_NEIGHBOURS=configs.power_of_two(neighbours),
            WIDTH=width,
            BLOCK_WIDTH=block_width,
            BLOCK_HEADS=max(16, configs.power_of_two(sharing)),
            BLOCK_KEYS=launch.keys,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )  # fmt: skip
    merge_parts_kernel[(batch * heads,)](
        partial, partial_lse, out, lse, all_parts,
        WIDTH=width, BLOCK_WIDTH=block_width, BLOCK_PARTS=configs.power_of_two(all_parts), num_warps=2,
    )  # fmt: skip
