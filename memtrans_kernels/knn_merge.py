"""The K nearest among what W shares of a memory found, in Triton: one launch, and no sort.

Entry i of a row is in share i mod W, which keeps it as its entry i // W in a ring of `size` slots. With `newest` its
newest entry, a share's slot s holds

    entry(w, s) = (newest[w] - (newest[w] - s) mod size) · W + w

and a candidate's place is how many of the W·K candidates of its query are better: of a higher score, or of the same
score and older.

    scores, slots (W, B, H, N, K) · newest (W, B, H) -> scores, entries (B, H, N, K), places (W, B, H, N, K)

A program compares the K candidates of one share with those of all, for a few queries; the candidate of place p writes
neighbour p, so no two programs write the same number. Nothing depends on the order within a share.

Source: Wu et al. 2022, section 3.2, for memories beyond one device. Limits: K at most 128; no float64. Precision:
scores are compared and copied as they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memtrans_kernels import configs


@triton.jit
def candidates(scores, slots, newest, share, query, inside, queries, length, size, SHARES: tl.constexpr,
               NEIGHBOURS: tl.constexpr, BLOCK_NEIGHBOURS: tl.constexpr):  # fmt: skip
    """Scores and entries of one share's candidates for some queries (QUERIES, K); -inf and -1 where there is none."""
    column = tl.arange(0, BLOCK_NEIGHBOURS)
    at = (share * queries + query)[:, None] * NEIGHBOURS + column[None, :]
    mask = inside[:, None] & (column < NEIGHBOURS)[None, :]
    score = tl.load(scores + at, mask=mask, other=float("-inf"))
    slot = tl.load(slots + at, mask=mask, other=-1).to(tl.int64)
    latest = tl.load(newest + (share * queries + query) // length, mask=inside, other=0)[:, None]
    behind = latest % size - slot  # one division a query, not one for each of its candidates
    behind = tl.where(behind < 0, behind + size, behind)  # the slot was written the round before
    return score, tl.where(slot >= 0, (latest - behind) * SHARES + share, -1)


@triton.jit
def knn_merge_kernel(
    scores, slots, newest, best_scores, best_entries, places, queries, length, size,
    SHARES: tl.constexpr, NEIGHBOURS: tl.constexpr, BLOCK_NEIGHBOURS: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(1).to(tl.int64)
    query = tl.program_id(0).to(tl.int64) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    inside = query < queries
    score, entry = candidates(
        scores, slots, newest, share, query, inside, queries, length, size, SHARES, NEIGHBOURS, BLOCK_NEIGHBOURS
    )  # fmt: skip
    place = tl.zeros([BLOCK_QUERIES, BLOCK_NEIGHBOURS], tl.int32)
    found = tl.zeros([BLOCK_QUERIES], tl.int32)
    for other in tl.range(0, SHARES):
        rival, rival_entry = candidates(
            scores, slots, newest, other, query, inside, queries, length, size, SHARES, NEIGHBOURS, BLOCK_NEIGHBOURS
        )  # fmt: skip
        found += tl.sum((rival_entry >= 0).to(tl.int32), axis=1)
        better = rival[:, None, :] > score[:, :, None]  # (QUERIES, K, K)
        older = (rival[:, None, :] == score[:, :, None]) & (rival_entry[:, None, :] < entry[:, :, None])
        place += tl.sum(((better | older) & (rival_entry >= 0)[:, None, :]).to(tl.int32), axis=2)
    place = tl.where(entry >= 0, tl.minimum(place, NEIGHBOURS), NEIGHBOURS)

    column = tl.arange(0, BLOCK_NEIGHBOURS)
    mask = inside[:, None] & (column < NEIGHBOURS)[None, :]
    tl.store(places + (share * queries + query)[:, None] * NEIGHBOURS + column[None, :], place, mask=mask)
    target = query[:, None] * NEIGHBOURS + place
    won = mask & (place < NEIGHBOURS)
    tl.store(best_scores + target, score, mask=won)
    tl.store(best_entries + target, entry, mask=won)
    missing = mask & (column[None, :] >= tl.where(share == 0, found, NEIGHBOURS)[:, None])  # the first share's part
    target = query[:, None] * NEIGHBOURS + column[None, :]
    tl.store(best_scores + target, float("-inf"), mask=missing)
    tl.store(best_entries + target, -1, mask=missing)


def knn_merge(scores: Tensor, slots: Tensor, newest: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """One program for each share and block of queries."""
    scores, slots, newest = scores.contiguous(), slots.contiguous(), newest.contiguous()
    shares, *shape = scores.shape
    best_scores = scores.new_empty(shape)
    best_entries = slots.new_empty(shape, dtype=torch.int64)
    places = slots.new_empty(scores.shape)
    queries, neighbours = best_scores.numel() // max(1, shape[-1]), shape[-1]
    launch = configs.merge(neighbours)
    if scores.numel():
        knn_merge_kernel[(triton.cdiv(queries, launch.block), shares)](
            scores, slots, newest, best_scores, best_entries, places, queries, shape[2], size,
            SHARES=shares,
            NEIGHBOURS=neighbours,
            BLOCK_NEIGHBOURS=configs.power_of_two(neighbours),
            BLOCK_QUERIES=launch.block,
            num_warps=launch.warps,
        )  # fmt: skip
    return best_scores, best_entries, places
