"""How much of each query's weight went to each place of the document, above what goes there whatever the query is.

A few entries, those of " the" or of punctuation, are near every query. So a place has a background, its median share
over the queries, and what a query has looked up is what stands out above it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FEWEST = 8  # queries that a background is made of; the median of a few is one of their own numbers


class Shares(NamedTuple):
    """Pairs of a query and a place, in the order of queries, then places.

    Attributes:
        query: (n,) int64. position: (n,) int64. share: (n,) float64, of the query's weight, a mean over layers and
            heads. background: (n,) float64, the median of the place's share over all queries.
        queries: how many there are.
    """

    query: Tensor
    position: Tensor
    share: Tensor
    background: Tensor
    queries: int

    @property
    def lift(self) -> Tensor:
        """What stands out above the background, at least 0."""
        return (self.share - self.background).clamp(min=0.0)

    @property
    def is_usual(self) -> Tensor:
        """Which pairs are background for the most part (n,) bool."""
        return self.background > self.lift

    def of(self, query: int) -> Shares:
        """The pairs of one query."""
        begin, end = torch.searchsorted(self.query, torch.tensor([query, query + 1], device="cpu")).tolist()
        return self._picked(slice(begin, end))

    def among(self, queries: Sequence[int]) -> Shares:
        """The pairs of some queries."""
        kept = torch.isin(self.query, torch.tensor(list(queries), dtype=torch.int64, device="cpu"))
        return self._picked(kept)

    def _picked(self, index: slice | Tensor) -> Shares:
        query, position, share, background = (column[index] for column in self[:4])
        return Shares(query, position, share, background, self.queries)

    def best(self, top: int) -> list[int]:
        """Which pairs stand out most, so many at most, best first."""
        lift = self.lift.masked_fill(self.is_usual, 0.0)
        best = lift.topk(min(top, len(lift)))
        return best.indices[best.values > 0.0].tolist()

    def usual(self, top: int) -> list[int]:
        """Which pairs have the largest share among those that are background."""
        best = self.share.masked_fill(~self.is_usual, 0.0).topk(min(top, len(self.share)))
        return best.indices[best.values > 0.0].tolist()


def shares_of(parts: Sequence[tuple[Tensor, Tensor]]) -> Shares:
    """Adds up, for each query and place, the weights of some layers.

    parts: positions and weights (H, Q, K) of each layer, on the CPU; -1 for no entry.

    >>> positions = torch.stack((torch.full((8,), 7), 20 + torch.arange(8)), dim=1)[None]  # 7, and one of its own
    >>> weights = torch.tensor([0.2, 0.5]).expand(1, 8, 2)
    >>> of_query = shares_of([(positions, weights)]).of(3)
    >>> of_query.position.tolist(), [round(share, 3) for share in of_query.background.tolist()]
    ([7, 23], [0.2, 0.0])
    >>> of_query.position[of_query.best(2)].tolist(), of_query.position[of_query.usual(2)].tolist()
    ([23], [7])
    """
    queries = parts[0][0].shape[1] if parts else 0
    heads = [positions.shape[0] for positions, _ in parts]
    at = torch.cat(
        [torch.arange(queries, device="cpu")[None, :, None].expand_as(p).flatten() for p, _ in parts] or [_NONE]
    )
    position = torch.cat([positions.flatten() for positions, _ in parts] or [_NONE])
    weight = torch.cat(
        [w.flatten().double() / (h * len(parts)) for (_, w), h in zip(parts, heads, strict=True)] or [_NONE]
    )
    there = (position >= 0) & (weight > 0)
    at, position, weight = at[there], position[there], weight[there]
    beyond = int(position.max()) + 1 if len(position) else 1
    pair, place = torch.unique(at * beyond + position, return_inverse=True)
    share = torch.zeros(len(pair), dtype=torch.float64, device="cpu").index_add_(0, place, weight.double())
    position = pair % beyond
    return Shares(pair // beyond, position, share, _medians(position, share, queries), queries)


_NONE = torch.zeros(0, dtype=torch.int64, device="cpu")


def _medians(position: Tensor, share: Tensor, queries: int) -> Tensor:
    """For each pair the lower median of its place's share over all queries; 0 where they are too few."""
    if queries < FEWEST or not len(position):
        return torch.zeros_like(share)
    _, inverse, count = torch.unique(position, return_inverse=True, return_counts=True)
    by_share = torch.argsort(share, stable=True)
    ordered = share[by_share[torch.argsort(inverse[by_share], stable=True)]]  # by place, then rising
    rank = (queries - 1) // 2 - (queries - count)  # among those that are there; the others come first, as zeros
    first = count.cumsum(0) - count
    median = torch.where(rank >= 0, ordered[first + rank.clamp(min=0)], 0.0)
    return median[inverse]
