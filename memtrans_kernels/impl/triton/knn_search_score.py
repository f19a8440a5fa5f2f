"""Scores the keys of chosen runs again: what `knn_search_maxima.py` computed and threw away.

    candidates[q, j · RUN + i] = <query[q], key of the i-th entry of run chosen[q, j]>, -inf where there is none

The products equal those of the maxima bit for bit, or the choice of runs proves nothing: both kernels sum over D in the
same order, with the same kind of instruction. A product of many queries by many keys takes another one than a product
of a few on some GPUs, so here the keys are the many rows. A tile is KEYS rows, as many of each of BLOCK queries, times
COLUMNS columns, each of these queries in turn; of every row one column is its own query's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memtrans_kernels.impl.triton.knn_search_maxima import (
    load_rows,
    magnitude,
    product,
    slot_of,
    window_of,
)


@triton.jit
def knn_score_kernel(
    query, keys, rows, start, cursor, shown, chosen, candidates,
    first_query, queries, first_row, queries_of_row, size, capacity, keys_of_row,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr,
    RUN: tl.constexpr, LIST: tl.constexpr, SHOWN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    EACH: tl.constexpr = KEYS // BLOCK
    number = tl.program_id(0) * BLOCK + tl.arange(0, KEYS) // EACH  # the query of each row of the tile
    inside = number < queries
    here = tl.minimum(number, queries - 1).to(tl.int64)
    index = (first_query + here) // queries_of_row
    row, oldest, count = window_of(rows, start, cursor, index, size, capacity)
    column_of = tl.program_id(0) * BLOCK + tl.arange(0, COLUMNS) % BLOCK
    of_column = first_query + tl.minimum(column_of, queries - 1).to(tl.int64)
    own = column_of[None, :] == number[:, None]
    SINGLE: tl.constexpr = WIDTH <= CHUNK
    left = load_rows(query, of_column, 0, WIDTH, CHUNK)
    for first in tl.range(0, LIST * RUN, EACH):
        place = first + tl.arange(0, KEYS) % EACH
        run = tl.load(chosen + here * LIST + place // RUN)
        age = run * RUN + place % RUN
        fine = (run >= 0) & (age < count)
        at = row * size + slot_of(age, oldest, size)
        products = tl.zeros([KEYS, COLUMNS], tl.float32)
        largest = tl.zeros([KEYS], tl.int32)
        if SINGLE:
            right = load_rows(keys, at, 0, WIDTH, CHUNK)
            products = product(products, right, left, False, PRECISION)
            if not SHOWN:
                largest = magnitude(right)
        else:
            for column in tl.range(0, WIDTH, CHUNK):
                part = load_rows(query, of_column, column, WIDTH, CHUNK)
                right = load_rows(keys, at, column, WIDTH, CHUNK)
                products = product(products, right, part, False, PRECISION)
                if not SHOWN:
                    largest = tl.maximum(largest, magnitude(right))
        if SHOWN:
            fine = fine & (tl.load(shown + (index - first_row) * keys_of_row + age, mask=fine, other=0) != 0)
        else:
            fine = fine & (largest < 0x7F800000)
        if BLOCK > 1:
            products = tl.where(own, products, float("-inf"))
        score = tl.where(fine, tl.max(products, axis=1), float("-inf"))
        tl.store(candidates + here * (LIST * RUN) + place, score, mask=inside)
