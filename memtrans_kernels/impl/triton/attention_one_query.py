"""Memory attention of one query a head (decoding) in Triton: neighbours and local keys split over programs.

    out = softmax([cap(scale · scores) + offset, cap(scale · q kᵀ) + bias, sink]) · [memory values, values, 0]

    query (B, H, 1, D); the rest as in `memory_attention` -> out (B, H, 1, E), lse (B, H, 1)

One program a head would read its document's local keys one tile after the other, and so would all heads that share
them: 256 KB each with L = 1024 and D = 64. Here a program takes some of the local keys of one key/value head, with the
query heads that share it as the rows of its tile; others take the neighbours of one head, gathered at once. Each
leaves its part of the softmax, out and lse in float32, and a second kernel merges the parts of each head. Where the
local keys are one tile, a program does all of one head.

    partial (parts, B, H, E) · partial_lse (parts, B, H), in units of ln 2; with K > 0 the neighbours are the last part

Source: Wu et al. 2022, section 3.1; split keys after Flash-Decoding (Dao et al. 2023). Limits and precision: those of
`memory_attention`; no dropout.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from memtrans_kernels.attention_inputs import AttentionInputs
from memtrans_kernels.impl.triton import configs
from memtrans_kernels.impl.triton.attention_softmax import attend_to_local, take_sink
from memtrans_kernels.impl.triton.attention_tiles import (
    AS_IT_IS,
    LN2,
    LOG2E,
    bytes_of,
    capped,
    gather_rows,
    load_rows,
    oldest_key,
    packed,
    strides_of_dense,
    widths,
)

BLOCK_HEADS = 16  # the fewest rows that a product takes; of more heads that share keys each block has its programs


@triton.jit
def attend_to_some_neighbours(
    ring, scores, slots, factor, offset, at, stride, begin, NEIGHBOURS: tl.constexpr, BLOCK_NEIGHBOURS: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, BLOCK_VALUES: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """The softmax state of BLOCK_NEIGHBOURS neighbours of one head from `begin` on, gathered at once."""
    k = begin + tl.arange(0, BLOCK_NEIGHBOURS)
    slot = tl.load(slots + at * NEIGHBOURS + k, mask=k < NEIGHBOURS, other=-1)
    score = tl.load(scores + at * NEIGHBOURS + k, mask=k < NEIGHBOURS, other=0.0)
    gathered = gather_rows(ring, slot, stride, VALUE_WIDTH, BLOCK_VALUES)
    logits = tl.where(slot >= 0, capped(score * factor, CAP) + offset, float("-inf"))
    peak = tl.max(logits, axis=0)
    weights = tl.exp2(logits - tl.where(peak == float("-inf"), 0.0, peak))
    return tl.sum(weights[:, None] * gathered, axis=0), peak, tl.sum(weights, axis=0)


@triton.jit
def attend_to_neighbours_of_head(
    memory_values, rows, scores, slots, scale, memory_offset, row, head, at, memory_strides,
    NEIGHBOURS: tl.constexpr, BLOCK_NEIGHBOURS: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_VALUES: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """The softmax state of a head's neighbours, acc (E,).

    The head is number `at` of all B·H, its row number of B·G.
    """
    offset = 0.0 if memory_offset is None else tl.load(memory_offset + head).to(tl.float32) * LOG2E
    factor = tl.load(scale + head).to(tl.float32) * LOG2E
    ring = memory_values + tl.load(rows + row) * memory_strides[0]
    acc, peak, total = attend_to_some_neighbours(
        ring, scores, slots, factor, offset, at, memory_strides[1], 0, NEIGHBOURS, BLOCK_NEIGHBOURS, VALUE_WIDTH,
        BLOCK_VALUES, CAP,
    )  # fmt: skip
    if NEIGHBOURS > BLOCK_NEIGHBOURS:
        for begin in tl.range(BLOCK_NEIGHBOURS, NEIGHBOURS, BLOCK_NEIGHBOURS):
            found, highest, more = attend_to_some_neighbours(
                ring, scores, slots, factor, offset, at, memory_strides[1], begin, NEIGHBOURS, BLOCK_NEIGHBOURS,
                VALUE_WIDTH, BLOCK_VALUES, CAP,
            )  # fmt: skip
            higher = tl.maximum(peak, highest)
            finite = tl.where(higher == float("-inf"), 0.0, higher)
            before, now = tl.exp2(peak - finite), tl.exp2(highest - finite)
            acc, total, peak = acc * before + found * now, total * before + more * now, higher
    return acc, peak, total


@triton.jit
def attend_to_keys_of_group(
    acc, peak, total, query, key, value, scale, bias_table, bias_dense, local_length, key_mask, first, b, g, heads,
    all_heads, begin, end, local_keys, distances, query_strides, key_strides, value_strides, dense_strides,
    NEIGHBOURS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUES: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_KEYS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Adds the local keys [begin, end) to the softmax state of `heads`, acc (BLOCK_HEADS, E), which share them."""
    q = load_rows(query + b * query_strides[0], heads, all_heads, query_strides[1], WIDTH, BLOCK_WIDTH)
    factor = (tl.load(scale + heads).to(tl.float32) * LOG2E)[:, None]
    if bias_table is not None:
        bias_table += (heads * distances)[:, None]
    if bias_dense is not None:
        bias_dense += b * dense_strides[0] + (heads * dense_strides[1])[:, None]
    if key_mask is not None:
        key_mask += b * local_keys
    oldest = oldest_key(local_length, b, local_keys)
    if first is not None:
        oldest = tl.maximum(tl.load(first + b).to(tl.int32), oldest)
    return attend_to_local(
        acc, peak, total, q, key + b * key_strides[0] + g * key_strides[1],
        value + b * value_strides[0] + g * value_strides[1], key_strides[2], value_strides[2], begin, end, 0, 0, 0,
        tl.zeros([BLOCK_HEADS], tl.int32), factor, bias_table, 0.0, bias_dense, dense_strides[2:], key_mask, oldest,
        (1, local_keys, distances), 0, b, heads, local_length is not None or first is not None, True, CAP, NEIGHBOURS,
        WIDTH, BLOCK_WIDTH, VALUE_WIDTH, BLOCK_VALUES, BLOCK_KEYS, 0, AS_IT_IS, False,
    )  # fmt: skip


@triton.jit
def store_state(acc, peak, total, out, lse, at, inside, unit, VALUE_WIDTH: tl.constexpr, BLOCK_VALUES: tl.constexpr):
    """Writes softmax states, acc (BLOCK, E), as results number `at` (BLOCK,); lse times `unit`."""
    total = tl.where(total == 0.0, 1.0, total)  # nothing to attend to: out is 0, lse is the peak, -inf
    column = tl.arange(0, BLOCK_VALUES)
    mask = inside[:, None] & (column < VALUE_WIDTH)[None, :]
    tl.store(
        out + at[:, None] * VALUE_WIDTH + column[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=mask
    )
    tl.store(lse + at, (peak + tl.log2(total)) * unit, mask=inside)


@triton.jit
def attend_in_parts_kernel(
    query, key, value, memory_values, rows, scores, slots, scale, bias_table, bias_dense, memory_offset, local_length,
    key_mask, first, partial, partial_lse, groups, sharing, local_keys, distances, parts, keys_of_part, head_blocks,
    query_strides, key_strides, value_strides, memory_strides, dense_strides,
    NEIGHBOURS: tl.constexpr, BLOCK_NEIGHBOURS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, BLOCK_VALUES: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """Grid (B·G, a program a part and block of heads, and with neighbours one a head)."""
    row, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, g, all_heads = row // groups, row % groups, tl.num_programs(0).to(tl.int64) * sharing
    if program < parts * head_blocks:
        part, i = program // head_blocks, program % head_blocks * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        heads = g * sharing + tl.minimum(i, sharing - 1)
        acc, peak, total = attend_to_keys_of_group(
            tl.zeros([BLOCK_HEADS, BLOCK_VALUES], tl.float32), tl.full([BLOCK_HEADS], float("-inf"), tl.float32),
            tl.zeros([BLOCK_HEADS], tl.float32), query, key, value, scale, bias_table, bias_dense, local_length,
            key_mask, first, b, g, heads, groups * sharing, part * keys_of_part,
            tl.minimum(part * keys_of_part + keys_of_part, local_keys), local_keys, distances, query_strides,
            key_strides, value_strides, dense_strides,
            NEIGHBOURS, WIDTH, BLOCK_WIDTH, VALUE_WIDTH, BLOCK_VALUES, BLOCK_HEADS, BLOCK_KEYS, CAP,
        )  # fmt: skip
        at = part * all_heads + row * sharing + i
        store_state(acc, peak, total, partial, partial_lse, at, i < sharing, 1.0, VALUE_WIDTH, BLOCK_VALUES)
    else:
        head = program - parts * head_blocks
        found, highest, sum_of = attend_to_neighbours_of_head(
            memory_values, rows, scores, slots, scale, memory_offset, row, g * sharing + head, row * sharing + head,
            memory_strides, NEIGHBOURS, BLOCK_NEIGHBOURS, VALUE_WIDTH, BLOCK_VALUES, CAP,
        )  # fmt: skip
        one = tl.arange(0, 1)
        place = parts * all_heads + row * sharing + head + one
        store_state(
            found[None, :], highest + one, sum_of + one, partial, partial_lse, place, one < 1, 1.0, VALUE_WIDTH,
            BLOCK_VALUES,
        )  # fmt: skip


@triton.jit
def attend_whole_kernel(
    query, key, value, memory_values, rows, scores, slots, scale, bias_table, bias_dense, memory_offset, local_length,
    key_mask, first, sink, out, lse, groups, sharing, local_keys, distances,
    query_strides, key_strides, value_strides, memory_strides, dense_strides,
    NEIGHBOURS: tl.constexpr, BLOCK_NEIGHBOURS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, BLOCK_VALUES: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """Grid (B·H,): neighbours and local keys of one head, which every row of its tile repeats."""
    at = tl.program_id(0).to(tl.int64)
    row, all_heads = at // sharing, groups * sharing
    b, g, head, i = row // groups, row % groups, at % all_heads, tl.arange(0, BLOCK_HEADS)
    acc = tl.zeros([BLOCK_HEADS, BLOCK_VALUES], tl.float32)
    peak = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    if NEIGHBOURS > 0:
        found, highest, sum_of = attend_to_neighbours_of_head(
            memory_values, rows, scores, slots, scale, memory_offset, row, head, at, memory_strides,
            NEIGHBOURS, BLOCK_NEIGHBOURS, VALUE_WIDTH, BLOCK_VALUES, CAP,
        )  # fmt: skip
        acc, peak, total = acc + found[None, :], tl.maximum(peak, highest), total + sum_of
    acc, peak, total = attend_to_keys_of_group(
        acc, peak, total, query, key, value, scale, bias_table, bias_dense, local_length, key_mask, first, b, g,
        head + i * 0, all_heads, 0, local_keys, local_keys, distances, query_strides, key_strides, value_strides,
        dense_strides, NEIGHBOURS, WIDTH, BLOCK_WIDTH, VALUE_WIDTH, BLOCK_VALUES, BLOCK_HEADS, BLOCK_KEYS, CAP,
    )  # fmt: skip
    if sink is not None:
        peak, total, shrink = take_sink(sink, peak, total, head)
        acc *= shrink[:, None]
    store_state(acc, peak, total, out, lse, at + i, i < 1, LN2, VALUE_WIDTH, BLOCK_VALUES)


@triton.jit
def merge_parts_kernel(
    partial, partial_lse, sink, out, lse, heads, parts, VALUE_WIDTH: tl.constexpr, BLOCK_VALUES: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """One program per document and head."""
    part, column = tl.arange(0, BLOCK_PARTS), tl.arange(0, BLOCK_VALUES)
    bh, all_heads = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    at = part * all_heads + bh
    of_part = tl.load(partial_lse + at, mask=part < parts, other=float("-inf"))
    mask = (part < parts)[:, None] & (column < VALUE_WIDTH)[None, :]
    values = tl.load(partial + at[:, None] * VALUE_WIDTH + column[None, :], mask=mask, other=0.0)
    peak = tl.max(of_part, axis=0)
    weights = tl.exp2(of_part - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(weights, axis=0)
    if sink is not None:
        peak, total, shrink = take_sink(sink, peak, total, bh % heads)
        weights *= shrink
    total = tl.where(total == 0.0, 1.0, total)  # nothing to attend to: out is 0, lse is the peak, -inf
    merged = tl.sum(weights[:, None] * values, axis=0) / total
    tl.store(out + bh * VALUE_WIDTH + column, merged.to(out.dtype.element_ty), mask=column < VALUE_WIDTH)
    tl.store(lse + bh, (peak + tl.log2(total)) * LN2)


def attend_once(inputs: AttentionInputs, out: Tensor, lse: Tensor) -> None:
    """Fills out and lse: in one launch where the local keys are one tile, else in two: parts, and merging.

    The last axis of query, key, value and memory_values is contiguous.
    """
    query, key, value, memory_values = inputs.query, inputs.key, inputs.value, inputs.memory_values
    batch, heads, _, _ = query.shape
    groups, local_keys, neighbours = key.shape[1], key.shape[2], inputs.neighbours
    if batch * heads == 0:
        return
    launch = configs.attention_one_query(query.dtype.itemsize, inputs.widest, local_keys)
    sharing, parts = heads // groups, configs.blocks_of(local_keys, launch.of_part)
    tensors = (
        query, key, value, memory_values, packed(inputs.rows), packed(inputs.scores), packed(inputs.slots),
        packed(inputs.scale), packed(inputs.bias_table), inputs.bias_dense, packed(inputs.memory_offset),
        packed(inputs.local_length), bytes_of(inputs.key_mask), packed(inputs.first),
    )  # fmt: skip
    sink = packed(inputs.sink)
    sizes = groups, sharing, local_keys, inputs.distances
    strides = (
        query.stride()[:3], key.stride()[:3], value.stride()[:3], memory_values.stride()[:2],
        strides_of_dense(inputs.bias_dense),
    )  # fmt: skip
    shared = {
        "NEIGHBOURS": neighbours,
        "BLOCK_NEIGHBOURS": configs.neighbours_of_one_query(neighbours, inputs.value_width),
        "BLOCK_HEADS": BLOCK_HEADS,
        "CAP": inputs.soft_cap or 0.0,
        **widths(inputs),
        "BLOCK_KEYS": launch.keys,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }
    if parts <= 1:
        attend_whole_kernel[(batch * heads,)](*tensors, sink, out, lse, *sizes, *strides, **shared)
        return
    all_parts = parts + (1 if neighbours else 0)
    partial = lse.new_empty(all_parts, batch, heads, inputs.value_width)
    partial_lse = lse.new_empty(all_parts, batch, heads)
    head_blocks = configs.blocks_of(sharing, BLOCK_HEADS)
    attend_in_parts_kernel[(batch * groups, parts * head_blocks + (sharing if neighbours else 0))](
        *tensors, partial, partial_lse, *sizes, parts, launch.of_part, head_blocks, *strides, **shared
    )
    merge_parts_kernel[(batch * heads,)](
        partial, partial_lse, sink, out, lse, heads, all_parts, VALUE_WIDTH=shared["VALUE_WIDTH"],
        BLOCK_VALUES=shared["BLOCK_VALUES"], BLOCK_PARTS=configs.power_of_two(all_parts), num_warps=2,
    )  # fmt: skip
