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
    """One program owns a memory row, so it needs many warps to keep enough bytes in flight.

    H200, 16 rows of 512 x 64: 8.3 us with 16 warps, 7.1 with 32; 128 rows of 512 x 128: 26.5 and 21.9 us.
    """
    return Launch(block=max(1, 16384 // power_of_two(width)), warps=32)


def cosine(width: int) -> Launch:
    """About 2048 numbers a program. H200, 16 x 8 x 512 queries and as many keys of 128: 19.7 us, with 4096 22.3."""
    return Launch(block=max(1, 2048 // power_of_two(width)), warps=4)
