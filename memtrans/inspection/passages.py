"""Places of a document that were looked up, put together to passages."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LONGEST = 32  # tokens of a passage
SMALL = 0.001  # of the largest score: what has less neither makes a passage nor is named in one


class Passage(NamedTuple):
    """A stretch of the document that was looked up.

    Attributes:
        begin, end: its first token and the one behind its last, counted in the document. share: of the queries' weight,
            above the background. positions: of the entries in it that count, in their order.
    """

    begin: int
    end: int
    share: float
    positions: tuple[int, ...]


def passages_of(position: Tensor, share: Tensor, score: Tensor, top: int, longest: int = LONGEST) -> list[Passage]:
    """The stretches of at most `longest` tokens that score highest, highest first; none overlaps another.

    position: (n,) int64. share, score: (n,) of each of them; a place may come several times.

    >>> share = torch.tensor([0.2, 0.2, 0.1, 0.4, 0.0])
    >>> found = passages_of(torch.tensor([5, 900, 7, 903, 5]), share, share, top=2)
    >>> [(passage.begin, passage.end, round(passage.share, 2)) for passage in found]
    [(900, 904, 0.6), (5, 8, 0.3)]
    """
    places, inverse = torch.unique(position, return_inverse=True)
    shares, scores = (
        torch.zeros(len(places), dtype=torch.float64, device=places.device).index_add_(0, inverse, numbers.double())
        for numbers in (share, score)
    )
    last = torch.searchsorted(places, places + longest)  # of a stretch that begins at each place
    found: list[Passage] = []
    highest = 0.0
    while len(places) and len(found) < top:
        sums = torch.nn.functional.pad(scores.cumsum(0), (1, 0))
        of_stretch = sums[last] - sums[:-1]
        begin = int(of_stretch.argmax())
        score_here = float(of_stretch[begin])
        highest = max(highest, score_here)
        if score_here <= SMALL * highest:
            break
        inside = slice(begin, int(last[begin]))
        here = places[inside][scores[inside] > SMALL * scores[inside].max()].tolist()
        found.append(Passage(here[0], here[-1] + 1, float(shares[inside].sum()), tuple(here)))
        shares[inside], scores[inside] = 0.0, 0.0
    return found
