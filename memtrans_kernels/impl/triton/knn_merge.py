"""The K nearest among what W shares of a memory found, in Triton: one launch, and no sort.

Entry i of a row is in share i mod W, which keeps it as its entry i // W in a ring of `size` slots. Of a row's `total`
entries share w has held[w] = (total + W - 1 - w) // W, and its slot s holds the entry

    entry(w, s) = total - 1 - (rounds(w, s) · W + lag[w])
    rounds(w, s) = (held[w] - 1 - s) mod size, so many entries of its share are younger
    lag[w] = (total + W - 1 - w) mod W, how many entries of the row are younger than the newest of its share

A candidate's place is how many of the W·K candidates of its query are better: of a higher score, or of the same score
and older, which is of more rounds, or of as many and a greater lag. Missing ones come last: their score is -inf, and
they count as younger than all entries, by -1 round. So places are a permutation, and the candidates of the first K
places, missing ones among them, write all neighbours: no two the same.

    scores, slots (W, B, H, N, K) · rows (B·G,) · total (R,)
    -> scores, entries (B, H, N, K), places (W, B, H, N, K)

Each share's K are in this order already. How many of its own share are better is therefore a candidate's column; how
many of another share, a binary search says. A program takes some candidates of one share and head.

Source: Wu et al. 2022, section 3.2, for memories beyond one device. Limits: no float64. Precision: scores are compared
through float32, which keeps them as they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memtrans_kernels.impl.triton import configs


@triton.jit
def rounds_of(slot, held, size):
    """How many entries of a share are younger than those in its slots; -1 where there is none."""
    rounds = (held % size).to(tl.int32) - 1 - slot
    rounds = tl.where(rounds < 0, rounds + size, rounds)
    return tl.where(slot >= 0, rounds, -1)


@triton.jit
def knn_merge_kernel(
    scores, slots, rows, total, best_scores, best_entries, places, heads, heads_of_row, candidates, size,
    SHARES: tl.constexpr, NEIGHBOURS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(candidates, BLOCK)
    head, share = tl.program_id(0) // blocks, tl.program_id(1)
    stored = tl.load(total + tl.load(rows + head // heads_of_row)) + SHARES - 1
    held, lag = (stored - share) // SHARES, (stored - share) % SHARES

    candidate = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)  # of the N·K of a share and head
    column = candidate % NEIGHBOURS
    inside = candidate < candidates
    at = (share.to(tl.int64) * heads + head) * candidates + candidate
    score = tl.load(scores + at, mask=inside, other=float("-inf")).to(tl.float32)
    slot = tl.load(slots + at, mask=inside, other=-1)
    rounds = rounds_of(slot, held, size)

    place = column
    for distance in tl.range(1, SHARES):
        other = (share + distance) % SHARES
        other_held, other_lag = (stored - other) // SHARES, (stored - other) % SHARES
        longer = (other_lag > lag).to(tl.int32)
        rivals = (other.to(tl.int64) * heads + head) * candidates
        better = tl.zeros([BLOCK], tl.int32)
        for step in tl.static_range(STEPS):
            more = better + (1 << (STEPS - 1 - step))  # are so many of them better?
            last = candidate - column + more - 1
            mask = inside & (more <= NEIGHBOURS)
            rival = tl.load(scores + rivals + last, mask=mask, other=float("-inf")).to(tl.float32)
            tied = mask & (rival == score)
            rival_rounds = rounds_of(tl.load(slots + rivals + last, mask=tied, other=-1), other_held, size)
            older = rival_rounds + longer > rounds
            better = tl.where((rival > score) | (tied & older), more, better)
        place += better

    found = slot >= 0
    tl.store(places + at, tl.where(found, tl.minimum(place, NEIGHBOURS), NEIGHBOURS), mask=inside)
    entry = stored - SHARES - (rounds.to(tl.int64) * SHARES + lag)
    won = inside & (place < NEIGHBOURS)
    target = head.to(tl.int64) * candidates + candidate - column + place
    tl.store(best_scores + target, score.to(best_scores.dtype.element_ty), mask=won)
    tl.store(best_entries + target, tl.where(found, entry, -1), mask=won)


def knn_merge(scores: Tensor, slots: Tensor, rows: Tensor, total: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """One program for each share, head and block of candidates."""
    scores, slots, rows, total = scores.contiguous(), slots.contiguous(), rows.contiguous(), total.contiguous()
    shares, batch, heads, length, neighbours = scores.shape
    best_scores = scores.new_empty(scores.shape[1:])
    best_entries = slots.new_empty(scores.shape[1:], dtype=torch.int64)
    places = slots.new_empty(scores.shape)
    candidates = length * neighbours
    launch = configs.merge(candidates)
    if scores.numel():
        knn_merge_kernel[(batch * heads * configs.blocks_of(candidates, launch.block), shares)](
            scores, slots, rows, total, best_scores, best_entries, places,
            batch * heads, batch * heads // rows.numel(), candidates, size,
            SHARES=shares,
            NEIGHBOURS=neighbours,
            STEPS=neighbours.bit_length(),
            BLOCK=launch.block,
            num_warps=launch.warps,
        )  # fmt: skip
    return best_scores, best_entries, places
