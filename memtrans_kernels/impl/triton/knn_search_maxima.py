"""The largest inner product of every run of keys: the part of the Triton search that meets all keys.

    maxima[q, r] = max <query[q], key[i]> over the entries i of run r,  r = 0 ... M / RUN - 1
    tops[q, t]   = the same over a whole tile of KEYS entries

Entries are counted by age, from the oldest visible one on, so a run never wraps and older runs have smaller numbers.
A program owns QUERIES queries of one memory row and one of SPLITS shares of its tiles of keys. `maxima` is laid out as
(tiles, queries, KEYS / RUN), so that a program writes whole lines; `tops` is (queries, tiles). Within a tile keys are
loaded in the order that leaves a run's products in one thread of a tensor core's result: columns 8j + c, whatever j.

What must not be found never counts: `shown` says it key by key where many programs share a tile, `whole` for a tile.
Where one program sees a tile alone, it looks at the numbers itself. NaN is ignored by `tl.max`.

Precision: exact products, float32 accumulation; `knn_search_score.py` makes the same products again, bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def window_of(rows, start, cursor, index, size, capacity):
    """Of a row of the search: its row of the ring, the slot of its oldest visible entry, how many are visible."""
    row = tl.load(rows + index)
    end = tl.load(cursor + row)
    begin = tl.maximum(tl.maximum(tl.load(start + row), end - capacity), 0)
    return row, (begin % size).to(tl.int32), tl.maximum(end - begin, 0).to(tl.int32)


@triton.jit
def slot_of(age, oldest, size):
    """The slots of entries by age; some slot of the ring where there is no such entry."""
    slot = age - (size - oldest)
    slot = tl.where(slot < 0, slot + size, slot)
    return tl.maximum(tl.minimum(slot, size - 1), 0)


@triton.jit
def load_rows(base, index, column, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Rows `index` of (..., WIDTH) numbers, CHUNK columns from `column` on, zeros beyond the last."""
    at = column + tl.arange(0, CHUNK)
    place = base + index.to(tl.int64)[:, None] * WIDTH + at[None, :]
    if WIDTH % CHUNK == 0:
        return tl.load(place)
    return tl.load(place, mask=at[None, :] < WIDTH, other=0.0)


@triton.jit
def halves(numbers):
    """Of float32 numbers the nearest that tensor-float-32 can hold, and what is left; nothing where not finite."""
    bits = numbers.to(tl.int32, bitcast=True)
    absolute = bits & 0x7FFFFFFF
    rounding = tl.where(absolute < 0x7F7FF000, 0x1000, 0)  # the largest numbers would become infinite
    large = ((bits + rounding) & -0x2000).to(tl.float32, bitcast=True)
    finite = absolute < 0x7F800000
    return tl.where(finite, large, numbers), tl.where(finite, numbers - large, 0.0)


@triton.jit
def product(sums, left, right, QUERY_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """sums + left · right: left (I, D), right (J, D), sums (I, J) float32.

    The sums of a query and a key are the same bits whichever of them is on the left; QUERY_FIRST says which.
    """
    if PRECISION == "elements":  # the interpreter's tl.dot is NumPy's, which rounds by shape and place
        return sums + tl.sum(left.to(tl.float32)[:, None, :] * right.to(tl.float32)[None, :, :], axis=2)
    if PRECISION == "three":
        large, small = halves(left)
        large_right, small_right = halves(right)
        if QUERY_FIRST:
            sums = tl.dot(small, tl.trans(large_right), sums, input_precision="tf32")
            sums = tl.dot(large, tl.trans(small_right), sums, input_precision="tf32")
        else:
            sums = tl.dot(large, tl.trans(small_right), sums, input_precision="tf32")
            sums = tl.dot(small, tl.trans(large_right), sums, input_precision="tf32")
        return tl.dot(large, tl.trans(large_right), sums, input_precision="tf32")
    return tl.dot(left, tl.trans(right), sums, input_precision="ieee")


@triton.jit
def magnitude(numbers):
    """float32 bits of the largest absolute value of each row, as integers, which puts NaN above infinity."""
    bits = numbers.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=1)


@triton.jit
def knn_shown_kernel(
    keys, rows, start, cursor, shown, whole, first_row, size, capacity, tiles,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """shown (rows, tiles · KEYS) int8: visible and finite; whole (rows, tiles) int32: all of a tile are."""
    index, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row, oldest, count = window_of(rows, start, cursor, first_row + index, size, capacity)
    age = tile * KEYS + tl.arange(0, KEYS)
    base = keys + row * size * WIDTH
    slot = slot_of(age, oldest, size)
    largest = tl.zeros([KEYS], tl.int32)
    if tile * KEYS < count:
        for column in tl.static_range(0, WIDTH, CHUNK):
            largest = tl.maximum(largest, magnitude(load_rows(base, slot, column, WIDTH, CHUNK)))
    fine = ((age < count) & (largest < 0x7F800000)).to(tl.int32)
    place = index.to(tl.int64) * tiles + tile
    tl.store(shown + place * KEYS + tl.arange(0, KEYS), fine.to(tl.int8))
    tl.store(whole + place, tl.min(fine, axis=0))


@triton.jit
def knn_maxima_kernel(
    query, keys, rows, start, cursor, shown, whole, maxima, tops,
    first_block, first_query, queries, first_row, queries_of_row, blocks_of_row, size, capacity, tiles,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, RUN: tl.constexpr,
    SPLITS: tl.constexpr, SHOWN: tl.constexpr, TOPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = first_block + tl.program_id(0)  # of queries
    index = block // blocks_of_row
    row, oldest, count = window_of(rows, start, cursor, index, size, capacity)
    number = block % blocks_of_row * QUERIES + tl.arange(0, QUERIES)  # of the queries of this row
    inside = number < queries_of_row
    flat = index.to(tl.int64) * queries_of_row + number
    of_query = tl.where(inside, flat, index.to(tl.int64) * queries_of_row)
    here = flat - first_query
    page = tl.cast(queries, tl.int64) * (KEYS // RUN)  # from a tile's maxima to the next one's
    base = keys + row * size * WIDTH
    flags = (index - first_row).to(tl.int64) * tiles

    column_of = tl.arange(0, KEYS)
    lane, step = column_of % 8, column_of // 8
    order = (step // RUN * 8 + lane) * RUN + step % RUN  # which key of a tile each column holds
    runs = tl.arange(0, KEYS // RUN)
    SINGLE: tl.constexpr = WIDTH <= CHUNK
    left = load_rows(query, of_query, 0, WIDTH, CHUNK)
    there = tl.cdiv(count, KEYS)
    share = tl.cdiv(there, SPLITS)
    first = tl.program_id(1) * share
    for tile in tl.range(first, tl.minimum(first + share, there)):
        age = tile * KEYS + order
        slot = slot_of(age, oldest, size)
        products = tl.zeros([QUERIES, KEYS], tl.float32)
        largest = tl.zeros([KEYS], tl.int32)
        if SINGLE:
            right = load_rows(base, slot, 0, WIDTH, CHUNK)
            products = product(products, left, right, True, PRECISION)
            if not SHOWN:
                largest = magnitude(right)
        else:
            for column in tl.range(0, WIDTH, CHUNK):
                part = load_rows(query, of_query, column, WIDTH, CHUNK)
                right = load_rows(base, slot, column, WIDTH, CHUNK)
                products = product(products, part, right, True, PRECISION)
                if not SHOWN:
                    largest = tl.maximum(largest, magnitude(right))
        if SHOWN:
            if tl.load(whole + flags + tile) == 0:
                fine = tl.load(shown + flags * KEYS + age) != 0
                products = tl.where(fine[None, :], products, float("-inf"))
        else:
            fine = (age < count) & (largest < 0x7F800000)
            products = tl.where(fine[None, :], products, float("-inf"))
        best = tl.max(tl.reshape(products, [QUERIES, KEYS // (8 * RUN), RUN, 8]), axis=2)
        best = tl.reshape(best, [QUERIES, KEYS // RUN])
        target = here * (KEYS // RUN) + tile * page
        tl.store(maxima + target[:, None] + runs[None, :], best, mask=inside[:, None])
        if TOPS:
            tl.store(tops + here * tiles + tile, tl.max(best, axis=1), mask=inside)
