"""Keys and values of the entries in given slots in Triton, straight into the result.

pairs[b, h, n, k] = keys and values[rows[b·G + h // (H / G)], slots[b, h, n, k]], zeros where the slot is -1.

    keys, values (R, M + S, D) · rows (B·G,) · slots (B, H, N, K) -> pairs (B, H, N, K, 2, D)

A program owns a block of neighbours, whatever their queries, and copies their keys and values a block of columns at a
time. No two programs write the same number. Source: Wu et al. 2022, section 3.1. Limits: none. Precision: numbers are
cast from the ring's dtype to the result's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memtrans_kernels.impl.triton import configs
from memtrans_kernels.impl.triton.attention_tiles import rows_of

BLOCK_NUMBERS, MOST_COLUMNS, WARPS = 4096, 256, 4  # numbers and columns of a tile


@triton.jit
def copy_entries(ring, row, slot, to, key_strides, there, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Copies the entries in slots of rows (BLOCK,) to places (BLOCK,) of the result."""
    source = ring + row * key_strides[0] + slot.to(tl.int64) * key_strides[1]
    for begin in tl.static_range(0, WIDTH, BLOCK_WIDTH):
        column = begin + tl.arange(0, BLOCK_WIDTH)
        inside = there[:, None] & (column < WIDTH)[None, :]
        entry = tl.load(source[:, None] + column[None, :], mask=inside & (slot >= 0)[:, None], other=0.0)
        if to.dtype.element_ty.primitive_bitwidth < 32:
            entry = entry.to(tl.float32)  # float64 is rounded twice, as PyTorch rounds it
        tl.store(to[:, None] + column[None, :], entry.to(to.dtype.element_ty), mask=inside)


@triton.jit
def gather_pairs_kernel(
    keys, values, rows, slots, pairs, count, of_head, heads, groups, key_strides, value_strides,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # of a neighbour among all
    there = place < count
    bh = place // of_head
    row = tl.load(rows + bh // heads * groups + bh % heads // (heads // groups), mask=there, other=0)
    slot = tl.load(slots + place, mask=there, other=-1)
    to = pairs + place * (2 * WIDTH)
    copy_entries(keys, row, slot, to, key_strides, there, WIDTH, BLOCK_WIDTH)
    copy_entries(values, row, slot, to + WIDTH, value_strides, there, WIDTH, BLOCK_WIDTH)


def gather_pairs(keys: Tensor, values: Tensor, rows: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, N, K, 2, D) in that dtype."""
    keys, values, rows, slots = rows_of(keys), rows_of(values), rows.contiguous(), slots.contiguous()
    batch, heads, length, neighbours = slots.shape
    width = keys.shape[2]
    pairs = torch.empty(*slots.shape, 2, width, dtype=dtype, device=keys.device)
    if pairs.numel() == 0:
        return pairs
    columns = min(configs.power_of_two(width), MOST_COLUMNS)
    block = max(1, BLOCK_NUMBERS // columns)
    gather_pairs_kernel[(configs.blocks_of(slots.numel(), block),)](
        keys, values, rows, slots, pairs, slots.numel(), length * neighbours, heads, rows.numel() // batch,
        keys.stride()[:2], values.stride()[:2], WIDTH=width, BLOCK_WIDTH=columns, BLOCK=block, num_warps=WARPS,
    )  # fmt: skip
    return pairs
