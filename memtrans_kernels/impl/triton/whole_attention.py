"""Attention to all that a memory holds, where it lies, in one Triton kernel.

    out = softmax(scale · q kᵀ + offset) · values, over all visible entries of row rows[b·G + h // (H / G)], which are
    [max(start, cursor - M), cursor) without those whose key has a non-finite component

    query (B, H, N, D) · keys (R, M + S, D) · values (R, M + S, E) · rows (B·G,) · start, cursor (R,)
    scale, memory_offset (H,) · local_out (B, H, N, E), local_lse (B, H, N) -> out (B, H, N, E), lse (B, H, N)

A program owns a block of queries of one head and walks over the ring. A softmax usually follows its largest logit,
which costs each logit a comparison and each tile a wait. Here the block first takes a guess: by how long its queries
and the oldest keys are, no logit is far above it. Weights relative to that guess are those of any other reference
point, as long as no sum overflows or vanishes, and float32 and bfloat16 have room for 2^±100. Whether one did is seen
at the end, as is every NaN that a key or value brought in; such a block is done again with a running softmax, which
looks at each key. So tiles whose slots are all held take no mask, and entries where they or the ring end lie in at most
three others.

Source: Wu et al. 2022, section 3.1; Milakov and Gimelshein 2018 (arXiv 1805.02867). Limits: D and E at most 256; no
float64. Precision: products take the query's dtype (keys and values are cast to it, so are the weights; fp32 is not
rounded to tf32) and accumulate in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memtrans_kernels.attention_inputs import WholeInputs, strides_by_position
from memtrans_kernels.impl.triton import attention_tiles, configs
from memtrans_kernels.impl.triton.attention_tiles import LN2, LOG2E, load_rows, packed, rows_of
from memtrans_kernels.impl.triton.launching import launch

LEAST, MOST = tl.constexpr(2.0**-60), tl.constexpr(2.0**100)  # of a denominator, relative to the guess


@triton.jit
def load_tile(base, first, stride, seen, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """Slots from `first` on, (BLOCK_KEYS, BLOCK_WIDTH); zeros where they are not seen. `seen` None: all are."""
    base += tl.cast(first, tl.int64) * stride
    i, column = tl.arange(0, BLOCK_KEYS), tl.arange(0, BLOCK_WIDTH)
    place = base + (i[:, None] * stride + column[None, :])
    if seen is not None:
        return tl.load(place, mask=seen[:, None] & (column < WIDTH)[None, :], other=0.0)
    elif WIDTH < BLOCK_WIDTH:
        return tl.load(place, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(place)


@triton.jit
def guessed_peak(
    q, keys, stride, first, stop, factor, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_KEYS: tl.constexpr
):
    """The largest logit that the longest of the queries has with the longest of the first keys, if they point alike."""
    slot = first + tl.arange(0, BLOCK_KEYS)
    key = load_tile(keys, first, stride, slot < stop, WIDTH, BLOCK_WIDTH, BLOCK_KEYS).to(tl.float32)
    of_key, wide = tl.sum(key * key, axis=1), q.to(tl.float32)
    longest = tl.max(tl.where(of_key < float("inf"), of_key, 0.0), axis=0)
    return tl.abs(factor) * tl.sqrt(longest * tl.max(tl.sum(wide * wide, axis=1), axis=0))


@triton.jit
def attend_by_guess(
    acc, total, q, keys, values, key_stride, value_stride, first, stop, wrapped, factor, guess,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_VALUES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Weighted values and denominator of the slots [first, stop) and [0, wrapped), relative to the guess."""
    i = tl.arange(0, BLOCK_KEYS)
    begin = tl.cdiv(first, BLOCK_KEYS)
    until_stop = tl.maximum(stop // BLOCK_KEYS - begin, 0)
    for number in tl.range(0, until_stop + wrapped // BLOCK_KEYS):
        tile = tl.where(number < until_stop, begin + number, number - until_stop) * BLOCK_KEYS
        k = load_tile(keys, tile, key_stride, None, WIDTH, BLOCK_WIDTH, BLOCK_KEYS)
        weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * factor - guess)
        total += tl.sum(weights, axis=1)
        v = load_tile(values, tile, value_stride, None, VALUE_WIDTH, BLOCK_VALUES, BLOCK_KEYS)
        acc = tl.dot(weights.to(q.dtype), v, acc, input_precision="ieee")

    # tiles that hold other slots too: where entries begin, where they or the ring end, where those behind its end do
    at_first = (first % BLOCK_KEYS != 0) & (first < stop)
    another = (first % BLOCK_KEYS == 0) | (first // BLOCK_KEYS != stop // BLOCK_KEYS)
    at_stop = (stop % BLOCK_KEYS != 0) & (first < stop) & another
    at_wrapped = wrapped % BLOCK_KEYS != 0
    for edge in tl.range(0, at_first.to(tl.int32) + at_stop.to(tl.int32) + at_wrapped.to(tl.int32), num_stages=1):
        is_first, is_stop = at_first & (edge == 0), at_stop & (edge == at_first.to(tl.int32))
        end = tl.where(is_first, first, tl.where(is_stop, stop, wrapped))
        tile = end // BLOCK_KEYS * BLOCK_KEYS
        slot = tile + i
        seen = tl.where(is_first | is_stop, (slot >= first) & (slot < stop), slot < wrapped)
        k = load_tile(keys, tile, key_stride, seen, WIDTH, BLOCK_WIDTH, BLOCK_KEYS)
        hides = tl.where(seen, -guess, float("-inf"))
        weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * factor + hides[None, :])
        total += tl.sum(weights, axis=1)
        v = load_tile(values, tile, value_stride, seen, VALUE_WIDTH, BLOCK_VALUES, BLOCK_KEYS)
        acc = tl.dot(weights.to(q.dtype), v, acc, input_precision="ieee")
    return acc, total


@triton.jit
def attend_with_care(
    acc, peak, total, q, keys, values, key_stride, value_stride, first, stop, wrapped, slots, factor,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_VALUES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """The same with a running softmax, and without keys that are not finite."""
    for tile in tl.range(0, slots, BLOCK_KEYS):
        slot = tile + tl.arange(0, BLOCK_KEYS)
        held = ((slot >= first) & (slot < stop)) | (slot < wrapped)
        k = load_tile(keys, tile, key_stride, held, WIDTH, BLOCK_WIDTH, BLOCK_KEYS).to(q.dtype)
        finite = tl.min((tl.abs(k.to(tl.float32)) < float("inf")).to(tl.int32), axis=1) != 0
        seen = held & finite
        dot = tl.dot(q, tl.trans(k), input_precision="ieee")
        logits = tl.where(seen[None, :], dot * factor, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        reference = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - reference[:, None])
        shrink = tl.exp2(peak - reference)
        total = total * shrink + tl.sum(weights, axis=1)
        v = load_tile(values, tile, value_stride, seen, VALUE_WIDTH, BLOCK_VALUES, BLOCK_KEYS).to(q.dtype)
        acc = tl.dot(weights.to(q.dtype), v, acc * shrink[:, None], input_precision="ieee")
        peak = higher
    return acc, peak, total


@triton.jit
def with_local(acc, lse, local_out, local_lse, at, place, inside, mask):
    """Out and lse of one softmax over both parts, each of which has been divided by its own denominator."""
    of_local = tl.load(local_lse + at, mask=inside, other=0.0).to(tl.float32)
    highest = tl.maximum(lse, of_local)
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    share, local_share = tl.exp2((lse - reference) * LOG2E), tl.exp2((of_local - reference) * LOG2E)
    both = share + local_share
    divisor = tl.where(both == 0.0, 1.0, both)
    local = tl.load(local_out + place, mask=mask, other=0.0).to(tl.float32)
    acc = acc * (share / divisor)[:, None] + local * (local_share / divisor)[:, None]
    return acc, reference + tl.log2(both) * LN2


@triton.jit
def whole_attention_kernel(
    query, keys, values, rows, start, cursor, scale, local_out, local_lse, memory_offset, out, lse, heads, groups,
    length, slots, capacity, query_strides, key_strides, value_strides, local_strides, out_strides,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_VALUES: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, CAREFUL_KEYS: tl.constexpr, GUESS: tl.constexpr,
):  # fmt: skip
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(length, BLOCK_QUERIES)
    block, bh = (program % blocks).to(tl.int32), program // blocks
    b, h = bh // heads, bh % heads
    row = tl.load(rows + b * groups + h // (heads // groups))
    n = block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    inside, at = n < length, bh * length + n
    factor = tl.load(scale + h).to(tl.float32) * LOG2E
    q = load_rows(
        query + b * query_strides[0] + h * query_strides[1], n, length, query_strides[2], WIDTH, BLOCK_WIDTH
    )  # fmt: skip
    keys += row * key_strides[0]
    values += row * value_strides[0]
    newest = tl.load(cursor + row)
    oldest = tl.maximum(tl.maximum(tl.load(start + row), 0), newest - capacity)
    first, held = (oldest % slots).to(tl.int32), tl.maximum(newest - oldest, 0).to(tl.int32)
    stop, wrapped = tl.minimum(first + held, slots), tl.maximum(first + held - slots, 0)

    peak = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    acc = tl.zeros([BLOCK_QUERIES, BLOCK_VALUES], tl.float32)
    held_up = held == 0  # the guess did, or there was nothing to guess
    if GUESS:
        guess = guessed_peak(q, keys, key_strides[1], first, stop, factor, WIDTH, BLOCK_WIDTH, BLOCK_KEYS)
        acc, total = attend_by_guess(
            acc, total, q, keys, values, key_strides[1], value_strides[1], first, stop, wrapped, factor, guess,
            WIDTH, BLOCK_WIDTH, VALUE_WIDTH, BLOCK_VALUES, BLOCK_KEYS,
        )  # fmt: skip
        fine = (total >= LEAST) & (total < MOST) & (tl.min((tl.abs(acc) < float("inf")).to(tl.int32), axis=1) != 0)
        held_up = held_up | (tl.min((fine | (n >= length)).to(tl.int32), axis=0) != 0)
        peak = tl.where(total > 0.0, guess, float("-inf"))
    if not held_up:
        peak = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_QUERIES], tl.float32)
        acc = tl.zeros([BLOCK_QUERIES, BLOCK_VALUES], tl.float32)
        acc, peak, total = attend_with_care(
            acc, peak, total, q, keys, values, key_strides[1], value_strides[1], first, stop, wrapped, slots, factor,
            WIDTH, BLOCK_WIDTH, VALUE_WIDTH, BLOCK_VALUES, CAREFUL_KEYS,
        )  # fmt: skip

    total = tl.where(total == 0.0, 1.0, total)  # nothing to attend to: out is 0, lse is the peak, -inf
    acc = acc / total[:, None]
    logarithm = (peak + tl.log2(total)) * LN2
    if memory_offset is not None:
        logarithm += tl.load(memory_offset + h).to(tl.float32)
    column = tl.arange(0, BLOCK_VALUES)
    mask = inside[:, None] & (column < VALUE_WIDTH)[None, :]
    if local_out is not None:
        place = (
            b * local_strides[0] + h * local_strides[1] + n.to(tl.int64)[:, None] * local_strides[2] + column[None, :]
        )
        acc, logarithm = with_local(acc, logarithm, local_out, local_lse, at, place, inside, mask)
    out += b * out_strides[0] + h * out_strides[1]
    tl.store(
        out + n.to(tl.int64)[:, None] * out_strides[2] + column[None, :], acc.to(out.dtype.element_ty), mask=mask
    )  # fmt: skip
    tl.store(lse + at, logarithm, mask=inside)


def whole_attention(inputs: WholeInputs) -> tuple[Tensor, Tensor]:
    """One program per document, head and block of queries."""
    query, keys, values, rows, start, cursor, capacity, scale, local_out, local_lse, memory_offset = inputs
    (batch, heads, length, width), (slots, value_width) = query.shape, values.shape[1:]
    query, keys, values = rows_of(query), rows_of(keys), rows_of(values)
    local_out = None if local_out is None else rows_of(local_out)
    shape = batch, heads, length, value_width
    out = query.new_empty_strided(shape, strides_by_position(shape))
    lse = query.new_empty(batch, heads, length, dtype=torch.float32)
    config = configs.whole_attention(
        attention_tiles.target_of(query.device), query.dtype.itemsize, max(width, value_width)
    )
    programs = batch * heads * configs.blocks_of(length, config.queries)
    if programs:
        arguments = {
            "query": query, "keys": keys, "values": values, "rows": packed(rows), "start": packed(start),
            "cursor": packed(cursor), "scale": packed(scale), "local_out": local_out, "local_lse": packed(local_lse),
            "memory_offset": packed(memory_offset), "out": out, "lse": lse, "heads": heads,
            "groups": rows.numel() // batch, "length": length, "slots": slots, "capacity": capacity,
            "query_strides": query.stride()[:3], "key_strides": keys.stride()[:2], "value_strides": values.stride()[:2],
            "local_strides": None if local_out is None else local_out.stride()[:3], "out_strides": out.stride()[:3],
            "WIDTH": width, "BLOCK_WIDTH": configs.block_width(width), "VALUE_WIDTH": value_width,
            "BLOCK_VALUES": configs.block_width(value_width), "BLOCK_QUERIES": config.queries,
            "BLOCK_KEYS": config.keys, "CAREFUL_KEYS": config.careful_keys,
            "GUESS": query.dtype == keys.dtype == values.dtype != torch.float16,  # which has no room for it
        }  # fmt: skip
        options = {"num_warps": config.warps, "num_stages": config.stages}
        if config.registers:
            options["maxnreg"] = config.registers
        launch(whole_attention_kernel, (programs,), arguments, **options)
    return out, lse
