"""Ring write in Triton: cast, wrap and advance the cursors of all rows in one launch.

With base = at[row], or cursor[row] without `at`, entry base + j is new entry first + j. It goes to slot
(base + j) mod (M + S), for first + j below count and only where it is not stored already (base + j >= cursor[row]) and
among the newest M + S. Then cursor[row] becomes at least base + count - first.

    keys (R, M + S, D), values (R, M + S, E) · cursor, at (R,) · rows, count, first (B·G,)
    new_keys (B, G, N, D), new_values (B, G, N, E)

A row with a number out of range (row, count, first, entry below 0 or beyond 2^62) stays as it is.

Source: Wu et al. 2022, section 3.2. Limits: none of shape; keys, values and cursor, which are written in place, must be
contiguous, as `backends` checks; of the rest, what the kernel takes no strides of is made so. Precision: through
float32; finite numbers saturate at the ring's largest, infinite values too, infinite keys stay infinite. One program
owns a row: nobody else reads its cursor, so the write needs no second launch and no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memtrans_kernels.checks import MOST_ENTRIES as MOST
from memtrans_kernels.impl.triton import configs
from memtrans_kernels.impl.triton.launching import launch

MOST_ENTRIES = tl.constexpr(MOST)


@triton.jit
def saturated(x, LIMIT: tl.constexpr, KEEP_INFINITE: tl.constexpr):
    """NaN compares false and stays."""
    above, below = x > LIMIT, x < -LIMIT
    if KEEP_INFINITE:
        above, below = above & (x != float("inf")), below & (x != float("-inf"))
    return tl.where(above, LIMIT, tl.where(below, -LIMIT, x))


@triton.jit
def is_entry(number):
    """Whether entries may be counted on from this one: no sum with a segment's length overflows."""
    return (number >= 0) & (number <= MOST_ENTRIES)


@triton.jit
def write(
    ring, new, slot, source, column, mask, stride, WIDTH: tl.constexpr, LIMIT: tl.constexpr, KEEP_INFINITE: tl.constexpr
):
    """Copies entries `source` of one row to their slots."""
    mask = mask[:, None] & (column < WIDTH)[None, :]
    x = tl.load(new + source[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    x = saturated(x, LIMIT, KEEP_INFINITE).to(ring.dtype.element_ty)
    tl.store(ring + slot[:, None] * WIDTH + column[None, :], x, mask=mask)


@triton.jit
def knn_add_kernel(
    keys,
    values,
    cursor,
    rows,
    new_keys,
    new_values,
    count,
    at,
    first,
    ring_rows,
    groups,
    length,
    size,
    key_stride_b,
    key_stride_g,
    key_stride_n,
    value_stride_b,
    value_stride_g,
    value_stride_n,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
    KEY_LIMIT: tl.constexpr,
    VALUE_LIMIT: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    b, g = program // groups, program % groups
    row = tl.load(rows + program)
    inside = (row >= 0) & (row < ring_rows)
    row = tl.where(inside, row, 0)
    stored = tl.load(cursor + row)
    base = stored if at is None else tl.load(at + row)
    # A number that nobody could look at before the launch, and that fits nowhere, leaves its row as it is.
    sound = inside & is_entry(stored) & is_entry(base)
    end = base + length
    if count is not None:
        entries = tl.load(count + program)
        sound = sound & (entries >= 0) & (entries <= length)
        end = base + entries
    skipped = 0
    if first is not None:
        skipped = tl.load(first + program)
        sound = sound & (skipped >= 0) & (skipped <= length)
        end = tl.maximum(end - skipped, base)
    given = tl.where(sound, length, 0)
    keys += row * size * WIDTH
    values += row * size * VALUE_WIDTH
    new_keys += b * key_stride_b + g * key_stride_g
    new_values += b * value_stride_b + g * value_stride_g
    column, value_column = tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_VALUES)
    for begin in range(0, length, BLOCK):
        source = begin + tl.arange(0, BLOCK).to(tl.int64)  # (BLOCK,)
        entry = base + source - skipped
        fresh = (source >= skipped) & (source < given) & (entry >= stored) & (entry < end) & (entry >= end - size)
        slot = entry % size
        write(keys, new_keys, slot, source, column, fresh, key_stride_n, WIDTH, KEY_LIMIT, True)
        write(values, new_values, slot, source, value_column, fresh, value_stride_n, VALUE_WIDTH, VALUE_LIMIT, False)
    tl.debug_barrier()  # every warp has read the cursor before one of them moves it
    if sound:
        tl.store(cursor + row, tl.maximum(stored, end))


def knn_add_(
    keys: Tensor,
    values: Tensor,
    cursor: Tensor,
    rows: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    count: Tensor | None = None,
    at: Tensor | None = None,
    first: Tensor | None = None,
) -> None:
    """One program per picked row; it moves the cursor even where there is nothing to store."""
    _, groups, length, width = new_keys.shape
    if rows.numel() == 0:
        return
    new_keys, new_values = (new if new.stride(-1) == 1 else new.contiguous() for new in (new_keys, new_values))
    value_width = new_values.shape[3]
    config = configs.ring_write(max(width, value_width))
    key_strides, value_strides = new_keys.stride(), new_values.stride()
    arguments = {
        "keys": keys, "values": values, "cursor": cursor, "rows": rows.contiguous(), "new_keys": new_keys,
        "new_values": new_values, "count": None if count is None else count.contiguous(),
        "at": None if at is None else at.contiguous(), "first": None if first is None else first.contiguous(),
        "ring_rows": keys.shape[0], "groups": groups, "length": length, "size": keys.shape[1],
        "key_stride_b": key_strides[0], "key_stride_g": key_strides[1], "key_stride_n": key_strides[2],
        "value_stride_b": value_strides[0], "value_stride_g": value_strides[1], "value_stride_n": value_strides[2],
        "WIDTH": width, "BLOCK_WIDTH": configs.power_of_two(width),
        "VALUE_WIDTH": value_width, "BLOCK_VALUES": configs.power_of_two(value_width),
        "BLOCK": min(config.block, configs.power_of_two(length)),
        "KEY_LIMIT": torch.finfo(keys.dtype).max, "VALUE_LIMIT": torch.finfo(values.dtype).max,
    }  # fmt: skip
    launch(knn_add_kernel, (rows.numel(),), arguments, num_warps=config.warps)
