"""What W shares of a memory found, merged, is what one memory would have found."""

from __future__ import annotations

import pytest
import torch
from devices import live_backends, seeded, uninitialised_is_nan
from torch import Tensor

from memtrans_kernels import knn_merge

pytestmark = pytest.mark.device

on_every_backend = pytest.mark.parametrize("backend", live_backends("knn_merge"))
BATCH, HEADS, LENGTH, SIZE = 2, 3, 5, 40  # SIZE: slots of a share's row


def drawn(shares: int, k: int, entries: int, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, list[list[tuple]]]:
    """What each share found of `entries` entries, each with one of a few scores: its K best, in no particular order.

    Beside it, for each query, all candidates as (-score, entry).
    """
    newest = torch.stack([torch.full((BATCH, HEADS), (entries - 1 - share) // shares) for share in range(shares)])
    found = torch.full((shares, BATCH, HEADS, LENGTH, k), -torch.inf)
    slots = torch.full(found.shape, -1, dtype=torch.int32)
    candidates: list[list[tuple]] = []
    for query in range(BATCH * HEADS * LENGTH):
        candidates.append([])
        for share in range(shares):
            held = list(range(share, entries, shares))[-SIZE:]
            drawn = scores[torch.randint(len(scores), (len(held),), generator=seeded(97 * query + share))].tolist()
            best = sorted(zip((-score for score in drawn), held, strict=True))[:k]
            candidates[-1] += best
            for place, (score, entry) in enumerate(best[::-1]):
                index = (share, *divmod(query // LENGTH, HEADS), query % LENGTH, place)
                found[index], slots[index] = -score, entry // shares % SIZE
    return found, slots, newest, candidates


@on_every_backend
@pytest.mark.parametrize(
    ("shares", "k", "entries"), [(1, 4, 30), (2, 32, 70), (2, 5, 79), (3, 7, 300), (2, 3, 1), (4, 3, 0), (5, 1, 64)]
)
def test_the_best_of_all_shares_come_first_and_equal_ones_older_first(backend, shares, k, entries):
    found, slots, newest, candidates = drawn(shares, k, entries, torch.tensor([2.0, 0.5, 0.0, -0.0, -1.0]))
    with uninitialised_is_nan():
        scores, numbers, places = knn_merge(found, slots, newest, SIZE, backend=backend)
    assert (scores.dtype, numbers.dtype, places.dtype) == (torch.float32, torch.int64, torch.int32)
    rows = zip(candidates, scores.flatten(0, 2).tolist(), numbers.flatten(0, 2).tolist(), strict=True)
    for query, (all_of_query, best, best_numbers) in enumerate(rows):
        expected = sorted(all_of_query)[:k]
        missing = k - len(expected)
        assert best_numbers == [entry for _, entry in expected] + [-1] * missing
        assert best == [-score for score, _ in expected] + [-torch.inf] * missing
        b, h = divmod(query // LENGTH, HEADS)
        for share in range(shares):
            for place, slot in zip(
                places[share, b, h, query % LENGTH].tolist(), slots[share, b, h, query % LENGTH].tolist(), strict=True
            ):
                if place < k:
                    assert best_numbers[place] % shares == share and best_numbers[place] // shares % SIZE == slot
        won = (places.flatten(1, 3)[:, query] < k).sum()
        assert won == len(expected), "each neighbour has one candidate"


@on_every_backend
def test_more_neighbours_than_a_program_has_queries_for(backend):
    scores = torch.randn(2, 1, 1, 3, 100, generator=seeded(0))
    slots = torch.arange(100, dtype=torch.int32).expand(scores.shape)
    best, numbers, _ = knn_merge(scores, slots, torch.full((2, 1, 1), 99), 100, backend=backend)
    expected, order = scores.movedim(0, -2).flatten(-2).sort(dim=-1, descending=True)
    assert torch.equal(best, expected[..., :100])
    assert torch.equal(numbers, (order % 100 * 2 + order // 100)[..., :100])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"slots": torch.zeros(2, 1, 1, 3, 5, dtype=torch.int32)}, r"slots must have shape .* got \(2, 1, 1, 3, 5\)"),
        ({"slots": torch.zeros(2, 1, 1, 3, 4)}, "slots must be torch.int32, got torch.float32"),
        ({"newest": torch.zeros(3, 1, 1, dtype=torch.int64)}, r"newest must have shape .* got \(3, 1, 1\)"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"backend": "fastest"}, "backend must be one of .*, got 'fastest'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changed, message):
    given = {
        "scores": torch.zeros(2, 1, 1, 3, 4),
        "slots": torch.zeros(2, 1, 1, 3, 4, dtype=torch.int32),
        "newest": torch.zeros(2, 1, 1, dtype=torch.int64),
        "size": 8,
    }
    with pytest.raises((ValueError, TypeError), match=message):
        knn_merge(**{**given, **changed})
