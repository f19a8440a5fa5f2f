"""Searches drawn at random, many rows of a kind and size of their own in one call, and whether they are exact.

Shapes: the letters of `memtrans_kernels`; T = M + S slots of a row, Q queries of one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from helpers.checks import score_error_bound
from helpers.devices import seeded
from helpers.hard_keys import KINDS, hard_keys, queries_near
from helpers.rings import INF, Memory, memory
from torch import Tensor

NAN = float("nan")


class Drawn(NamedTuple):
    """Attributes:

    held: R rows, each with a kind of keys, a number of entries and a beginning of its own.
    query: (R, H, N, D). k: K.
    """

    held: Memory
    query: Tensor
    k: int


def drawn_search(
    seed: int, rows: int, widths: Sequence[int], dtypes: Sequence[torch.dtype], most: int, most_k: int = 128
) -> Drawn:
    """One call's search: M up to `most`, K up to `most_k`; some keys are not finite, hidden slots hold anything."""
    draw = random.Random(seed)
    capacity, width, dtype = int(2 ** draw.uniform(0, math.log2(most))), draw.choice(widths), draw.choice(dtypes)
    heads, length = draw.choice([1, 1, 2, 8]), draw.choice([1, 1, 2, 7, 33, 70])
    entries, queries = [], []
    for row in range(rows):
        count = draw.choice([draw.randint(1, 2 * capacity), capacity, 1 + capacity // 2])
        keys = hard_keys(draw.choice(list(KINDS)), count, width, dtype, seed * rows + row)
        near = queries_near(keys, heads * length, seed)
        far = hard_keys("random", heads * length, width, dtype, seed + 1)
        queries.append(torch.where(torch.rand(heads * length, 1, generator=seeded(seed + row)) < 0.9, near, far))
        if draw.random() < 0.2:
            worse = torch.rand(count, generator=seeded(row)) < draw.random()
            keys[worse, draw.randrange(width)] = draw.choice([NAN, INF, -INF])
        entries.append((draw.choice([0, 0, 0, draw.randint(0, count)]), keys))
    held = memory(entries, capacity, draw.randint(0, 300), hidden=draw.choice([INF, NAN, 1e3]))
    return Drawn(held, torch.stack(queries).reshape(rows, heads, length, width), draw.randint(1, most_k))


def assert_rows_are_exact(drawn: Drawn, scores: Tensor, slots: Tensor) -> None:
    """What `rings.assert_exact` and `checks.assert_nearest` ask of rows one by one, of all of them at once.

    scores, slots: (R, H, N, K).
    """
    held, keys, total = drawn.held, drawn.held.keys, drawn.held.keys.shape[1]
    query, scores, slots = (tensor.flatten(1, 2) for tensor in (drawn.query, scores, slots))  # (R, Q, ...)
    age = torch.full(keys.shape[:2], total)
    for row, shown in enumerate(held.visible):
        age[row, shown] = torch.arange(len(shown))
    seen = (age < total) & keys.isfinite().all(dim=-1)
    codes = codes_of(keys)
    keys = keys.masked_fill(~seen[..., None], 0.0)
    exact = (query.double() @ keys.double().mT).masked_fill(~seen[:, None], -INF)
    bound = score_error_bound(query, keys)

    def of_found(numbers: Tensor) -> Tensor:
        """Looks up numbers of slots (R, T) or (R, Q, T): (R, Q, K)."""
        by_query = numbers if numbers.dim() == 3 else numbers[:, None].expand(-1, slots.shape[1], -1)
        return by_query.gather(2, slots.clamp(min=0).long())

    found = slots >= 0
    expected = seen.sum(dim=1).clamp(max=drawn.k)[:, None, None]
    assert torch.equal(found, (torch.arange(drawn.k) < expected).expand_as(found)), "another number of neighbours"
    assert (scores[~found] == -INF).all()
    assert of_found(seen)[found].all(), "an entry that no search may see"
    ordered = slots.sort(dim=-1).values
    assert not ((ordered.diff(dim=-1) == 0) & (ordered[..., 1:] >= 0)).any(), "a neighbour was returned twice"
    got = of_found(exact)
    best = exact.topk(min(drawn.k, total), dim=-1).values
    kth = best.gather(2, (expected - 1).clamp(min=0).expand(-1, slots.shape[1], -1))
    assert (got >= kth - 2 * bound.amax(dim=-1, keepdim=True))[found].all(), "a nearer key was missed"
    assert ((scores.double() - got).abs() <= of_found(bound))[found].all(), "a score is not its key's"
    falls = scores.nan_to_num(neginf=-torch.finfo(torch.float32).max).diff(dim=-1)
    assert (falls <= 0).all(), "not best first"
    code = of_found(codes)
    equal = (code.diff(dim=-1) == 0) & found[..., 1:]
    assert (falls == 0)[equal].all(), "equal keys have different scores"
    by_age = age.argsort(dim=1, stable=True)
    place = torch.empty_like(by_age).scatter(1, by_age, nth_of_equals(codes.gather(1, by_age)))
    assert (of_found(place) == nth_of_equals(code))[found].all(), "equal keys are not the oldest, or not older first"


def codes_of(keys: Tensor) -> Tensor:
    """A number (R, T) for each key (R, T, D): the same for keys that are equal bit for bit, and for no others.

    But for one pair in 2^60.
    """
    bits = keys.contiguous().view(torch.int16 if keys.element_size() == 2 else torch.int32).long()
    factors = torch.randint(-(2**62), 2**62, bits.shape[-1:], generator=seeded(9)) * 2 + 1
    mixed = (bits + 1) * factors
    return ((mixed ^ (mixed >> 29)) * factors.flip(0)).sum(dim=-1)


def nth_of_equals(codes: Tensor) -> Tensor:
    """How many of the same number stand before each, along the last axis.

    >>> nth_of_equals(torch.tensor([7, 5, 7, 7, 5])).tolist()
    [0, 0, 1, 2, 1]
    """
    order = codes.argsort(dim=-1, stable=True)
    sorted_codes = codes.gather(-1, order)
    number = torch.arange(codes.shape[-1]).expand_as(codes)
    begins = torch.ones_like(codes, dtype=torch.bool)
    begins[..., 1:] = sorted_codes.diff(dim=-1) != 0
    first = torch.where(begins, number, 0).cummax(dim=-1).values
    return torch.empty_like(codes).scatter(-1, order, number - first)
