"""How much of each query's weight went to each place of the document, and what of that stands out.

A few entries, those of " the" or of punctuation, are near every query. So each place has a background in each head, its
median weight over the queries, and what a query has looked up lies above it: its lift. A head that gives half of its
weight to one entry tells more than ten that give a twentieth each: the third powers of their lifts rank places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FEWEST = 8  # queries that a background is made of; the median of a few is one of their own numbers


class Shares(NamedTuple):
    """Pairs of a query and a place, in the order of queries, then places; numbers are means over layers and heads.

    Attributes:
        query: (n,) int64. position: (n,) int64. share: (n,) float64, of the query's weight.
        background: (n,) float64, of the place, the same for every query.
        lift: (n,) float64, what heads give above their background. score: (n,) float64, of its third powers.
        queries: how many there are.
    """

    query: Tensor
    position: Tensor
    share: Tensor
    background: Tensor
    lift: Tensor
    score: Tensor
    queries: int

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
        return self._picked(torch.isin(self.query, torch.tensor(list(queries), dtype=torch.int64, device="cpu")))

    def standing_out(self) -> Shares:
        """The pairs that are no background."""
        return self._picked(~self.is_usual & (self.score > 0.0))

    def _picked(self, index: slice | Tensor) -> Shares:
        return self._replace(**{name: getattr(self, name)[index] for name in self._fields if name != "queries"})

    def best(self, top: int) -> list[int]:
        """Which pairs stand out most, so many at most, best first."""
        return _largest(self.score.masked_fill(self.is_usual, 0.0), top)

    def usual(self, top: int) -> list[int]:
        """Which pairs have the largest share among those that are background."""
        return _largest(self.share.masked_fill(~self.is_usual, 0.0), top)


def _largest(numbers: Tensor, top: int) -> list[int]:
    best = numbers.topk(min(top, len(numbers)))
    return [int(place) for place in best.indices[best.values > 0.0]]


def shares_of(parts: Sequence[tuple[Tensor, Tensor]]) -> Shares:
    """Adds up, for each query and place, what the heads of some layers gave.

    parts: positions and weights (H, Q, K) of each layer, on the CPU; -1 for no entry.

    >>> positions = torch.stack((torch.full((8,), 7), 20 + torch.arange(8)), dim=1)[None]  # 7, and one of its own
    >>> weights = torch.tensor([0.2, 0.5]).expand(1, 8, 2)
    >>> of_query = shares_of([(positions, weights)]).of(3)
    >>> of_query.position.tolist(), [round(share, 3) for share in of_query.background.tolist()]
    ([7, 23], [0.2, 0.0])
    >>> of_query.position[of_query.best(2)].tolist(), of_query.position[of_query.usual(2)].tolist()
    ([23], [7])
    """
    head, query, position, weight, part = (torch.cat(column) for column in zip(*_flat(parts), strict=True))
    queries = parts[0][0].shape[1]
    beyond = int(position.max()) + 1 if len(position) else 1
    of_head, median = _medians(head * beyond + position, weight, queries)
    lift = (weight - median[of_head]).clamp(min=0.0)
    pair, place = torch.unique(query * beyond + position, return_inverse=True)

    def summed(numbers: Tensor) -> Tensor:
        return torch.zeros(len(pair), dtype=torch.float64, device="cpu").index_add_(0, place, part * numbers)

    background = _of_places(head * beyond + position, of_head, median * _first(part, of_head, len(median)), beyond)
    at = pair % beyond
    return Shares(pair // beyond, at, summed(weight), background[at], summed(lift), summed(lift**3), queries)


def _flat(parts: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, ...]]:
    """Of each layer its entries: head, counted through all layers, query, position, weight, and the head's part."""
    flat: list[tuple[Tensor, ...]] = []
    heads_before = 0
    for positions, weights in parts:
        heads, queries, _ = positions.shape
        head = torch.arange(heads_before, heads_before + heads, device="cpu")[:, None, None].expand_as(positions)
        query = torch.arange(queries, device="cpu")[None, :, None].expand_as(positions)
        there = (positions >= 0) & (weights > 0)
        weight = weights[there].double()
        flat.append(
            (head[there], query[there], positions[there], weight, torch.full_like(weight, 1 / (heads * len(parts))))
        )
        heads_before += heads
    return flat


def _medians(group: Tensor, weight: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """The group (n,) of each entry, and each group's lower median over all queries; 0 where those are too few.

    Most queries give a group nothing: they come first, as zeros.
    """
    groups, of_entry, count = torch.unique(group, return_inverse=True, return_counts=True)
    if queries < FEWEST or not len(groups):
        return of_entry, torch.zeros(len(groups), dtype=torch.float64, device="cpu")
    by_weight = torch.argsort(weight)
    ordered = weight[by_weight[torch.argsort(of_entry[by_weight], stable=True)]]  # by group, then rising
    rank = (queries - 1) // 2 - (queries - count)
    first = count.cumsum(0) - count
    return of_entry, torch.where(rank >= 0, ordered[first + rank.clamp(min=0)], 0.0)


def _first(numbers: Tensor, group: Tensor, groups: int) -> Tensor:
    """One of the numbers of each group, which are alike."""
    return torch.zeros(groups, dtype=numbers.dtype, device="cpu").index_copy_(0, group, numbers)


def _of_places(key: Tensor, of_entry: Tensor, median: Tensor, beyond: int) -> Tensor:
    """Sums of the medians of all heads by place (beyond,)."""
    place = torch.zeros(len(median), dtype=torch.int64, device="cpu").index_copy_(0, of_entry, key % beyond)
    return torch.zeros(beyond, dtype=torch.float64, device="cpu").index_add_(0, place, median)
