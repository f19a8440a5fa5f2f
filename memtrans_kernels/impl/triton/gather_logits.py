"""Logits of the keys in given slots in Triton, and the gradient of the query.

logits[b, h, n, k] = <query[b, h, n], keys[rows[b·G + h // (H / G)], slots[b, h, n, k]]>, -inf where the slot is -1;
grad query = sum over k of grad[k] · key[k].

    query (B, H, N, D) · keys (R, M + S, D) · rows (B·G,) · slots, logits (B, H, N, K)

A program owns a block of queries of one head and gathers their keys, one of each query at a time. No two programs
write the same number. Source: Wu et al. 2022, section 3.1. Limits: no float64. Precision: products and sums are
float32, whatever query and keys hold.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memtrans_kernels.impl.triton import configs
from memtrans_kernels.impl.triton.attention_tiles import gather_rows, load_rows, rows_of

BLOCK_QUERIES, WARPS = 16, 4  # as attention gathers neighbours


@triton.jit
def gather_logits_kernel(
    query, keys, rows, slots, logits, heads, groups, length, query_strides, key_strides,
    NEIGHBOURS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
):  # fmt: skip
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(length, BLOCK_QUERIES)
    block, bh = (program % blocks).to(tl.int32), program // blocks
    b, h = bh // heads, bh % heads
    n = block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    inside, at = n < length, bh * length + n
    ring = keys + tl.load(rows + b * groups + h // (heads // groups)) * key_strides[0]
    q = load_rows(
        query + b * query_strides[0] + h * query_strides[1], n, length, query_strides[2], WIDTH, BLOCK_WIDTH
    ).to(tl.float32)  # fmt: skip
    for k in tl.range(0, NEIGHBOURS):
        slot = tl.load(slots + at * NEIGHBOURS + k, mask=inside, other=-1)
        logit = tl.sum(q * gather_rows(ring, slot, key_strides[1], WIDTH, BLOCK_WIDTH), axis=1)
        tl.store(logits + at * NEIGHBOURS + k, tl.where(slot >= 0, logit, float("-inf")), mask=inside)


@triton.jit
def gather_logits_backward_kernel(
    grad, keys, rows, slots, grad_query, heads, groups, length, key_strides,
    NEIGHBOURS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
):  # fmt: skip
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(length, BLOCK_QUERIES)
    block, bh = (program % blocks).to(tl.int32), program // blocks
    b, h = bh // heads, bh % heads
    n = block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    inside, at = n < length, bh * length + n
    ring = keys + tl.load(rows + b * groups + h // (heads // groups)) * key_strides[0]
    acc = tl.zeros([BLOCK_QUERIES, BLOCK_WIDTH], tl.float32)
    for k in tl.range(0, NEIGHBOURS):
        slot = tl.load(slots + at * NEIGHBOURS + k, mask=inside, other=-1)
        weight = tl.load(grad + at * NEIGHBOURS + k, mask=slot >= 0, other=0.0).to(tl.float32)
        acc += weight[:, None] * gather_rows(ring, slot, key_strides[1], WIDTH, BLOCK_WIDTH)
    column = tl.arange(0, BLOCK_WIDTH)
    mask = inside[:, None] & (column < WIDTH)[None, :]
    tl.store(grad_query + at[:, None] * WIDTH + column[None, :], acc.to(grad_query.dtype.element_ty), mask=mask)


def _launch(kernel: Any, tensors: tuple[Tensor, ...], slots: Tensor, groups: int, strides: tuple, width: int) -> None:
    batch, heads, length, neighbours = slots.shape
    programs = batch * heads * configs.blocks_of(length, BLOCK_QUERIES)
    if programs:
        kernel[(programs,)](
            *tensors, heads, groups, length, *strides, NEIGHBOURS=neighbours, WIDTH=width,
            BLOCK_WIDTH=configs.power_of_two(width), BLOCK_QUERIES=BLOCK_QUERIES, num_warps=WARPS,
        )  # fmt: skip


def gather_logits(query: Tensor, keys: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """(B, H, N, K) float32."""
    query, keys, rows, slots = rows_of(query), rows_of(keys), rows.contiguous(), slots.contiguous()
    logits = torch.empty(slots.shape, dtype=torch.float32, device=query.device)
    groups, strides = rows.numel() // max(query.shape[0], 1), (query.stride()[:3], keys.stride()[:2])
    _launch(gather_logits_kernel, (query, keys, rows, slots, logits), slots, groups, strides, query.shape[3])
    return logits


def gather_logits_backward(grad: Tensor, query: Tensor, keys: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """Gradient of query."""
    grad, keys, rows, slots = grad.contiguous(), rows_of(keys), rows.contiguous(), slots.contiguous()
    grad_query = query.new_empty(query.shape)
    groups, strides = rows.numel() // max(query.shape[0], 1), (keys.stride()[:2],)
    tensors = (grad, keys, rows, slots, grad_query)
    _launch(gather_logits_backward_kernel, tensors, slots, groups, strides, query.shape[3])
    return grad_query
