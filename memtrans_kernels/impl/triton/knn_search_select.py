"""The K best of a query's numbers, the first ones among equals: of maxima of runs, and of scores.

    choose   chosen[q, :] = the K best runs, by their maxima; or the K best children of runs chosen before
    coarsen  maxima of FAN runs each, where there are more than one program can hold
    best     scores, slots = the K best candidates, best first

A key among the K best, ordered by score and then by age, lies in one of the K best runs, ordered in the same way: each
run before its own holds a key that is better than all of its keys. So K runs are enough however many keys are equal.

The K-th best number is found by halving an interval of its bits, which takes at most 32 counts, whatever the numbers.
Where numbers are equal no halving parts them: after some the interval's ends are moved to numbers that there are, and
it is over as soon as only one of them is left. A program holds all numbers of BLOCK queries in registers: (BLOCK, N).
"""

from __future__ import annotations

import triton
import triton.language as tl

from memtrans_kernels.impl.triton.knn_search_maxima import slot_of, window_of

NOTHING = tl.constexpr(-2139095041)  # ordered(-inf)
LARGEST = tl.constexpr(0x7FFFFFFF)  # above ordered(inf)
HALVINGS = tl.constexpr(12)  # random numbers hardly take as many; where some are equal, numbers that occur end it


@triton.jit
def ordered(score):
    """float32 as integers of the same order: zeros of both signs are equal, NaN is no more than -inf."""
    bits = (tl.where(score == score, score, float("-inf")) + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def choose_best(value, K: tl.constexpr, LIST: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr):
    """Which of N numbers are the K best, the place of each among them in the given order, and how many they are.

    value (BLOCK, N). LIST: a power of two, at least K.
    """
    low = tl.full([BLOCK], NOTHING + 1, tl.int32)
    if N > LIST:  # each of LIST columns has one that reaches the least of their maxima
        columns = tl.max(tl.reshape(value, [BLOCK, N // LIST, LIST]), axis=1)
        low = tl.maximum(low, tl.min(columns, axis=1))
    low = low.to(tl.int64)  # widened here: Triton 3.6 fails to compile a wide maximum
    high = tl.max(value, axis=1).to(tl.int64) + 1
    count = tl.sum((value >= low.to(tl.int32)[:, None]).to(tl.int32), axis=1)
    open = (count > K) & (high - low > 1)
    halvings = 0
    while tl.max(open.to(tl.int32), axis=0) > 0:
        if halvings % HALVINGS == HALVINGS - 1:
            least = tl.min(tl.where(value >= low.to(tl.int32)[:, None], value, LARGEST), axis=1).to(tl.int64)
            most = tl.max(tl.where(value < high.to(tl.int32)[:, None], value, NOTHING), axis=1).to(tl.int64)
            low = tl.where(open, least, low)
            high = tl.where(open, most + 1, high)
        middle = low + (high - low) // 2
        there = tl.sum((value >= middle.to(tl.int32)[:, None]).to(tl.int32), axis=1)
        raised, lowered = open & (there >= K), open & (there < K)
        count = tl.where(raised, there, count)
        low = tl.where(raised, middle, low)
        high = tl.where(lowered, middle, high)
        open = (count > K) & (high - low > 1)
        halvings += 1
    bound = low.to(tl.int32)[:, None]
    chosen = (value >= bound).to(tl.int32)
    if tl.max(count, axis=0) > K:
        equal = (value == bound).to(tl.int32)
        better = chosen - equal
        room = (K - tl.sum(better, axis=1))[:, None]
        chosen = better + tl.where(tl.cumsum(equal, axis=1) <= room, equal, 0)
    return chosen != 0, tl.cumsum(chosen, axis=1) - 1, tl.minimum(count, K)[:, None]


# A stride that might be odd: loads four numbers wide would leave the tensor in another layout than the counts want it.
@triton.jit(do_not_specialize=["stride", "tile_stride"])
def knn_choose_kernel(
    maxima, parents, chosen, rows, start, cursor, first_query, queries, queries_of_row, size, capacity, stride,
    tile_stride, RUN: tl.constexpr, PART: tl.constexpr, FAN: tl.constexpr, K: tl.constexpr, LIST: tl.constexpr,
    BLOCK: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """chosen (queries, LIST) int32, older first, then -1. RUN: entries of a number of `maxima`.

    stride: from one query's numbers to the next, tile_stride: from each PART of a query's numbers, a power of two of
    them, to the next. FAN: children of each run in `parents` (queries, LIST); 0 chooses among all runs.
    """
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (number < queries)[:, None]
    here = tl.minimum(number, queries - 1).to(tl.int64)
    _, _, count = window_of(rows, start, cursor, (first_query + here) // queries_of_row, size, capacity)
    runs = tl.cdiv(count, RUN)[:, None]
    if FAN > 0:
        child = tl.arange(0, N)[None, :]
        parent = tl.load(parents + here[:, None] * LIST + child // FAN)
        run = parent * FAN + child % FAN
        present = (parent >= 0) & (run < runs)
    else:
        run = tl.arange(0, N)[None, :] + tl.zeros([BLOCK, N], tl.int32)
        present = run < runs
    place = here[:, None] * stride + (run // PART).to(tl.int64) * tile_stride + (run & (PART - 1))
    value = ordered(tl.load(maxima + place, mask=present, other=float("-inf")))
    taken, place, found = choose_best(value, K, LIST, BLOCK, N)
    target = chosen + here[:, None] * LIST
    tl.store(target + place, run, mask=taken & inside)
    rest = tl.arange(0, LIST)[None, :]
    tl.store(target + rest, tl.full([BLOCK, LIST], -1, tl.int32), mask=(rest >= found) & inside)


@triton.jit
def knn_coarsen_kernel(
    maxima, coarse, rows, start, cursor, first_query, queries_of_row, size, capacity, stride, coarse_stride,
    RUN: tl.constexpr, FAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """coarse (queries, coarse_stride): the largest of FAN numbers of `maxima` (queries, stride) each."""
    here = tl.program_id(0).to(tl.int64)
    _, _, count = window_of(rows, start, cursor, (first_query + here) // queries_of_row, size, capacity)
    target = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    run = target[:, None] * FAN + tl.arange(0, FAN)[None, :]
    number = tl.load(maxima + here * stride + run, mask=run < tl.cdiv(count, RUN), other=float("-inf"))
    tl.store(coarse + here * coarse_stride + target, tl.max(number, axis=1), mask=target < coarse_stride)


@triton.jit(do_not_specialize=["stride"])
def knn_best_kernel(
    candidates, chosen, scores, slots, rows, start, cursor, first_query, queries, queries_of_row, size, capacity,
    stride, RUN: tl.constexpr, K: tl.constexpr, LIST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scores, slots (all queries, K), best first, older first among equals, then -inf and -1."""
    N: tl.constexpr = LIST * RUN
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (number < queries)[:, None]
    here = tl.minimum(number, queries - 1).to(tl.int64)
    target = ((first_query + here) * K)[:, None]
    _, oldest, _ = window_of(rows, start, cursor, (first_query + here) // queries_of_row, size, capacity)
    score = tl.load(candidates + here[:, None] * stride + tl.arange(0, N)[None, :])
    taken, place, found = choose_best(ordered(score), K, LIST, BLOCK, N)
    position = tl.arange(0, N)[None, :] + tl.zeros([BLOCK, N], tl.int32)
    tl.store(slots + target + place, position, mask=taken & inside)
    tl.debug_barrier()  # what other threads stored is read now

    rank = tl.arange(0, LIST)[None, :]
    present = (rank < found) & inside
    position = tl.load(slots + target + rank, mask=present, other=0)
    score = tl.load(candidates + here[:, None] * N + position, mask=present, other=float("-inf"))
    entry = (ordered(score).to(tl.int64) << 32) | (N - 1 - position).to(tl.int64)
    entry = tl.sort(entry, descending=True)
    position = N - 1 - (entry & 0xFFFFFFFF).to(tl.int32)
    bits = (entry >> 32).to(tl.int32)
    score = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    run = tl.load(chosen + here[:, None] * LIST + position // RUN)
    slot = tl.where(rank < found, slot_of(run * RUN + position % RUN, oldest[:, None], size), -1)
    tl.debug_barrier()  # all have read
    tl.store(scores + target + rank, score, mask=(rank < K) & inside)
    tl.store(slots + target + rank, slot, mask=(rank < K) & inside)
