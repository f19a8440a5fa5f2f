"""A running softmax over neighbours and local keys, as the forward kernels of `memory_attention` share it.

Its state is (acc, peak, total): the weighted values, the largest logit and the denominator relative to it, in float32.
Logits are in units of ln 2. Source: Milakov and Gimelshein 2018 (arXiv 1805.02867); Dao et al. 2022 (arXiv 2205.14135).
"""

from __future__ import annotations

import triton
import triton.language as tl

from memtrans_kernels.impl.triton.attention_tiles import (
    LOG2E,
    capped,
    gather_rows,
    is_near,
    kept,
    load_mask,
    load_rows,
    local_logits,
)


@triton.jit
def some_of_retrieved_softmax(
    scores, slots, at, inside, scale, offset, begin, NEIGHBOURS: tl.constexpr, BLOCK_NEIGHBOURS: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """`retrieved_softmax` of BLOCK_NEIGHBOURS neighbours from `begin` on."""
    k = begin + tl.arange(0, BLOCK_NEIGHBOURS)
    entry = at[:, None] * NEIGHBOURS + k[None, :]
    slot = tl.load(slots + entry, mask=inside[:, None] & (k < NEIGHBOURS)[None, :], other=-1)
    score = tl.load(scores + entry, mask=slot >= 0, other=0.0)
    logits = tl.where(slot >= 0, capped(score * scale, CAP) + offset, float("-inf"))  # (BLOCK, K)
    peak = tl.max(logits, axis=1)
    total = tl.sum(tl.exp2(logits - tl.where(peak == float("-inf"), 0.0, peak)[:, None]), axis=1)
    return peak, total


@triton.jit
def retrieved_softmax(
    scores, slots, at, inside, scale, offset, NEIGHBOURS: tl.constexpr, BLOCK_NEIGHBOURS: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """Peak and denominator of the retrieved logits of queries `at`; -inf and 0 where there are none."""
    peak, total = some_of_retrieved_softmax(
        scores, slots, at, inside, scale, offset, 0, NEIGHBOURS, BLOCK_NEIGHBOURS, CAP
    )  # fmt: skip
    if NEIGHBOURS > BLOCK_NEIGHBOURS:
        for begin in tl.range(BLOCK_NEIGHBOURS, NEIGHBOURS, BLOCK_NEIGHBOURS):
            highest, more = some_of_retrieved_softmax(
                scores, slots, at, inside, scale, offset, begin, NEIGHBOURS, BLOCK_NEIGHBOURS, CAP
            )  # fmt: skip
            higher = tl.maximum(peak, highest)
            finite = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp2(peak - finite) + more * tl.exp2(highest - finite)
            peak = higher
    return peak, total


@triton.jit
def take_sink(sink, peak, total, h):
    """The peak and the denominator with the sink of head `h`, and what the weighted values are to be multiplied by."""
    logit = tl.load(sink + h).to(tl.float32) * LOG2E
    higher = tl.maximum(peak, logit)
    finite = tl.where(higher == float("-inf"), 0.0, higher)
    shrink = tl.exp2(peak - finite)
    return higher, total * shrink + tl.exp2(logit - finite), shrink


@triton.jit
def attend_to_neighbours(
    acc, values, scores, slots, at, inside, scale, offset, peak, stride, seed, b, h, n,
    NEIGHBOURS: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_VALUES: tl.constexpr, UNROLL: tl.constexpr,
    CAP: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """Adds the weighted values of the neighbours, one of each query at a time."""
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    for k in tl.range(0, NEIGHBOURS, num_stages=1, loop_unroll_factor=UNROLL):
        slot = tl.load(slots + at * NEIGHBOURS + k, mask=inside, other=-1)
        score = tl.load(scores + at * NEIGHBOURS + k, mask=inside, other=0.0)  # beside the slot, not after it
        weight = tl.where(slot >= 0, tl.exp2(capped(score * scale, CAP) + offset - peak), 0.0)
        if THRESHOLD > 0:
            weight = tl.where(kept(seed, b, h, n, k + n * 0, THRESHOLD), weight, 0.0)
        acc += weight[:, None] * gather_rows(values, slot, stride, VALUE_WIDTH, BLOCK_VALUES)
    return acc


@triton.jit
def attend_to_local(
    acc, peak, total, q, key, value, key_stride, value_stride, begin, end, near, far, first_query, m, scale, table,
    far_bias, dense, dense_strides, mask, oldest, sizes, seed, b, h, BOUND: tl.constexpr, CAUSAL: tl.constexpr,
    CAP: tl.constexpr, NEIGHBOURS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, BLOCK_VALUES: tl.constexpr, BLOCK_KEYS: tl.constexpr, THRESHOLD: tl.constexpr,
    TABLE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Adds the local keys [begin, end) to a running softmax; those before `near` and from `far` on are far from all
    queries. WHOLE: there are as many keys as tiles hold."""
    i = tl.arange(0, BLOCK_KEYS)
    for start in tl.range(begin, end, BLOCK_KEYS):
        j = start + i
        seen = None if mask is None else load_mask(mask, j[None, :], sizes[1])
        k = load_rows(key, j, sizes[1], key_stride, WIDTH, BLOCK_WIDTH, WHOLE).to(q.dtype)
        dot = tl.dot(q, tl.trans(k), input_precision="ieee")
        logits = local_logits(
            dot, first_query, m[:, None], start, i[None, :], scale, table, far_bias, dense, dense_strides, seen, oldest,
            sizes, is_near(start, near, far, CAUSAL), BOUND, CAUSAL, CAP, TABLE,
        )  # fmt: skip  # (BLOCK_QUERIES, BLOCK_KEYS)
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - finite[:, None])
        shrink = tl.exp2(peak - finite)
        total = total * shrink + tl.sum(weights, axis=1)
        if THRESHOLD > 0:
            keep = kept(seed, b, h, (first_query + m)[:, None], (NEIGHBOURS + j)[None, :], THRESHOLD)
            weights = tl.where(keep, weights, 0.0)
        v = load_rows(value, j, sizes[1], value_stride, VALUE_WIDTH, BLOCK_VALUES, WHOLE).to(q.dtype)
        acc = tl.dot(weights.to(q.dtype), v, acc * shrink[:, None], input_precision="ieee")
        peak = higher
    return acc, peak, total
