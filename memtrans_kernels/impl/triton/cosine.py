"""Unit queries and keys in Triton: normalised, cast and laid out for search and attention in one launch.

Forward: u = x / max(|x|, 1e-12) along D. Backward: (g - u <g, u>) / |x|, and g / 1e-12 where |x| is smaller than that.

    query (..., D) · key (..., D), of any strides with D contiguous -> the same shapes, contiguous

Source: Henry et al. 2020 (arXiv 2010.04245). Limits: fp16, bf16 and fp32. Precision: float32 throughout, one rounding
at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memtrans_kernels.impl.triton import configs
from memtrans_kernels.impl.triton.launching import launch

SMALLEST = tl.constexpr(1e-12)


@triton.jit
def norm(x):
    """|x| per row of x (BLOCK, D); through the largest component, so that no square leaves float32's range."""
    largest = tl.max(tl.abs(x), axis=1)
    scale = tl.where(largest > 0.0, largest, 1.0)
    scaled = x / scale[:, None]
    return tl.sqrt(tl.sum(scaled * scaled, axis=1)) * scale


@triton.jit
def load_rows(x, row, column, lengths, strides, mask):
    """Rows `row` of a (B, H, N, D) tensor counted through B, H and N; (BLOCK, D) in float32."""
    n, bh = row % lengths[1], row // lengths[1]
    start = (bh // lengths[0]) * strides[0] + (bh % lengths[0]) * strides[1] + n * strides[2]
    return tl.load(x + start[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def unit_rows(x, out, row, column, rows, lengths, strides, WIDTH: tl.constexpr):
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    wide = load_rows(x, row, column, lengths, strides, mask)
    unit = wide / tl.maximum(norm(wide), SMALLEST)[:, None]
    tl.store(out + row[:, None] * WIDTH + column[None, :], unit.to(out.dtype.element_ty), mask=mask)


@triton.jit
def unit_rows_backward(grad, x, grad_x, row, column, rows, lengths, grad_strides, strides, WIDTH: tl.constexpr):
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    wide = load_rows(x, row, column, lengths, strides, mask)
    g = load_rows(grad, row, column, lengths, grad_strides, mask)
    length = norm(wide)
    divisor = tl.maximum(length, SMALLEST)[:, None]
    unit = wide / divisor
    along = tl.where(length > SMALLEST, tl.sum(g * unit, axis=1), 0.0)  # below it the divisor is a constant
    result = (g - along[:, None] * unit) / divisor
    tl.store(grad_x + row[:, None] * WIDTH + column[None, :], result.to(grad_x.dtype.element_ty), mask=mask)


@triton.jit
def cosine_kernel(
    query,
    key,
    unit_query,
    unit_key,
    query_rows,
    key_rows,
    query_lengths,
    key_lengths,
    query_strides,
    key_strides,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, query_programs = tl.program_id(0).to(tl.int64), tl.cdiv(query_rows, BLOCK)
    column = tl.arange(0, BLOCK_WIDTH)
    if program < query_programs:
        row = program * BLOCK + tl.arange(0, BLOCK)
        unit_rows(query, unit_query, row, column, query_rows, query_lengths, query_strides, WIDTH)
    else:
        row = (program - query_programs) * BLOCK + tl.arange(0, BLOCK)
        unit_rows(key, unit_key, row, column, key_rows, key_lengths, key_strides, WIDTH)


@triton.jit
def cosine_backward_kernel(
    grad_unit_query,
    grad_unit_key,
    query,
    key,
    grad_query,
    grad_key,
    query_rows,
    key_rows,
    query_lengths,
    key_lengths,
    grad_query_strides,
    grad_key_strides,
    query_strides,
    key_strides,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, query_programs = tl.program_id(0).to(tl.int64), tl.cdiv(query_rows, BLOCK)
    column = tl.arange(0, BLOCK_WIDTH)
    if program < query_programs:
        row = program * BLOCK + tl.arange(0, BLOCK)
        unit_rows_backward(
            grad_unit_query, query, grad_query, row, column, query_rows, query_lengths,
            grad_query_strides, query_strides, WIDTH,
        )  # fmt: skip
    else:
        row = (program - query_programs) * BLOCK + tl.arange(0, BLOCK)
        unit_rows_backward(
            grad_unit_key, key, grad_key, row, column, key_rows, key_lengths,
            grad_key_strides, key_strides, WIDTH,
        )  # fmt: skip


def as_rows(tensor: Tensor) -> Tensor:
    """(..., D) as (B, H, N, D) with D contiguous; a copy only where no view does it."""
    if tensor.dim() != 4:
        tensor = tensor.reshape(1, 1, -1, tensor.shape[-1])
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def launch_over_rows(kernel: Any, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """One launch over the rows of the query and of the key, which come last in `tensors`."""
    tensors = [as_rows(tensor) for tensor in tensors]
    query, key = tensors[-2:]
    width, config = query.shape[-1], configs.cosine(query.shape[-1])
    rows = [tensor.numel() // max(width, 1) for tensor in (query, key)]
    programs = sum(configs.blocks_of(count, config.block) for count in rows)
    if programs:
        lengths = (tuple(tensor.shape[1:3]) for tensor in (query, key))
        strides = (tensor.stride()[:3] for tensor in tensors)
        given = (*tensors, *results, *rows, *lengths, *strides, width, configs.power_of_two(width), config.block)
        launch(kernel, (programs,), dict(zip(kernel.arg_names, given, strict=True)), num_warps=config.warps)


def cosine(query: Tensor, key: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Unit vectors of the shapes of query and key."""
    unit_query, unit_key = (torch.empty(t.shape, dtype=dtype or t.dtype, device=t.device) for t in (query, key))
    launch_over_rows(cosine_kernel, (query, key), (unit_query, unit_key))
    return unit_query, unit_key


def cosine_backward(grad_query: Tensor, grad_key: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of query and key, from those of their unit vectors."""
    results = query.new_empty(query.shape), key.new_empty(key.shape)
    launch_over_rows(cosine_backward_kernel, (grad_query, grad_key, query, key), results)
    return results
