"""Every block size of the Triton kernels, by the shape that decides it."""

from __future__ import annotations

from typing import NamedTuple


class Launch(NamedTuple):
    """Rows that one program handles at a time, and its warps."""

    block: int
    warps: int


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`: Triton's block sizes."""
    return 1 << max(0, number - 1).bit_length()


def ring_write(width: int) -> Launch:
    """One program owns a memory row, so it needs many warps to keep enough bytes in flight."""
    return Launch(block=max(1, 16384 // power_of_two(width)), warps=16)


def cosine(width: int) -> Launch:
    """About 4096 numbers a program: rows of any width in registers, and thousands of programs at training sizes."""
    return Launch(block=max(1, 4096 // power_of_two(width)), warps=4)


class AttentionLaunch(NamedTuple):
    """Queries and local keys of a tile, warps, tiles in flight, and neighbours whose rows are in flight together."""

    queries: int
    keys: int
    warps: int
    stages: int
    unroll: int = 1


def attention_forward(itemsize: int, width: int, length: int) -> AttentionLaunch:
    """Few queries (decoding) take the smallest tile that a matrix product has."""
    if itemsize > 2:
        return AttentionLaunch(queries=16 if length <= 16 else 32, keys=32, warps=4, stages=1)
    if length <= 16:
        return AttentionLaunch(queries=16, keys=64, warps=4, stages=2, unroll=8)
    if width <= 64:
        return AttentionLaunch(queries=64, keys=64, warps=4, stages=2, unroll=4)
    return AttentionLaunch(queries=64, keys=32, warps=4, stages=2, unroll=2)


def attention_query_gradient(itemsize: int, width: int, length: int) -> AttentionLaunch:
    """Gathers keys and values of the neighbours: twice the rows of the forward kernel in registers."""
    if itemsize > 2:
        return AttentionLaunch(queries=16 if length <= 16 else 32, keys=32, warps=4, stages=1)
    if length <= 16:
        return AttentionLaunch(queries=16, keys=64, warps=4, stages=1, unroll=4)
    return AttentionLaunch(queries=64 if width <= 64 else 32, keys=32, warps=4, stages=2, unroll=2)


def attention_key_gradient(itemsize: int, width: int) -> AttentionLaunch:
    """Few queries at a time: two sums of (keys, D) and two tiles of (keys, queries) stay in registers."""
    if itemsize > 2:
        return AttentionLaunch(queries=32, keys=32, warps=4, stages=1)
    return AttentionLaunch(queries=32, keys=64, warps=4, stages=2)


KEY_GRADIENT_PROGRAMS = 512  # about four for each multiprocessor of a large GPU


def head_parts(programs: int, heads: int) -> int:
    """Into how many parts the heads that share keys are split, so that there are enough programs."""
    return max(1, min(heads, KEY_GRADIENT_PROGRAMS // programs))


BIAS_PARTS = 16  # programs that share the documents and blocks of queries of one tile of the bias gradient


def attention_bias_gradient(itemsize: int, width: int) -> AttentionLaunch:
    """Square tiles: as many keys as queries."""
    block = 32 if itemsize > 2 else 64
    return AttentionLaunch(queries=block, keys=block, warps=4, stages=1)
