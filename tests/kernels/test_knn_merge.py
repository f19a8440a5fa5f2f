"""What W shares of a memory found, merged, is what one memory would have found."""

from __future__ import annotations

import pytest
import torch
from helpers.devices import live_backends, seeded, uninitialised_is_nan
from torch import Tensor

from memtrans_kernels import knn_merge

pytestmark = pytest.mark.device

on_every_backend = pytest.mark.parametrize("backend", live_backends("knn_merge"))
BATCH, HEADS, LENGTH, SIZE = 2, 4, 5, 40  # SIZE: slots of a share's row
INF = float("inf")
FEW_SCORES = torch.tensor([INF, 2.0, 0.5, 0.0, -0.0, -1.0, -INF])  # no search finds -inf; it would come before nothing

Candidates = list[list[tuple[float, int]]]  # of each query, (-score, entry)


def drawn(
    shares: int, k: int, rows: Tensor, total: Tensor, scores: Tensor, empty: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor, Candidates]:
    """What each share found among the entries of each row, which have one of a few scores; `empty` ones found nothing.

    Scores and slots (W, B, H, N, K), in the order of `knn_search`, and all candidates of each query.
    """
    found = torch.full((shares, BATCH * HEADS * LENGTH, k), -INF)
    slots = torch.full(found.shape, -1, dtype=torch.int32)
    candidates: Candidates = []
    for query in range(found.shape[1]):
        row = rows[query // LENGTH * len(rows) // (BATCH * HEADS)]
        candidates.append([])
        for share in set(range(shares)).difference(empty):
            held = range(share, int(total[row]), shares)[-SIZE:]
            drawn = scores[torch.randint(len(scores), (len(held),), generator=seeded(97 * query + share))].tolist()
            best = sorted(zip((-score for score in drawn), held, strict=True))[:k]
            candidates[-1] += best
            for place, (score, entry) in enumerate(best):
                found[share, query, place], slots[share, query, place] = -score, entry // shares % SIZE
    shape = (shares, BATCH, HEADS, LENGTH, k)
    return found.reshape(shape), slots.reshape(shape), candidates


def assert_merged(candidates: Candidates, slots: Tensor, scores: Tensor, entries: Tensor, places: Tensor) -> None:
    """The best of all candidates stand in order, then nothing; each was one candidate, in the slot of its entry."""
    assert (entries.dtype, places.dtype, places.shape) == (torch.int64, torch.int32, slots.shape)
    shares, k = len(slots), slots.shape[-1]
    neighbours = (tensor.flatten(0, 2).tolist() for tensor in (scores, entries))
    theirs = (tensor.flatten(1, 3).movedim(0, 1).tolist() for tensor in (places, slots))  # (Q, W, K)
    for all_of_query, best, numbers, places_of, slots_of in zip(candidates, *neighbours, *theirs, strict=True):
        expected = sorted(all_of_query)[:k]
        missing = k - len(expected)
        assert numbers == [entry for _, entry in expected] + [-1] * missing
        assert best == [-score for score, _ in expected] + [-INF] * missing
        won = []
        for share in range(shares):
            at_places = zip(places_of[share], slots_of[share], strict=True)
            won += [(place, share, slot) for place, slot in at_places if place != k]
        assert sorted(won) == [
            (place, entry % shares, entry // shares % SIZE) for place, (_, entry) in enumerate(expected)
        ]


@on_every_backend
@pytest.mark.parametrize("scores", [FEW_SCORES, FEW_SCORES[1:2]], ids=["few", "one"])
@pytest.mark.parametrize(
    ("shares", "k", "groups"),
    [(1, 4, 2), (2, 32, 1), (2, 5, 4), (3, 7, 2), (3, 1, 1), (5, 3, 2), (5, 13, 4), (1, 1, 4)],
)
def test_the_best_of_all_shares_come_first_and_equal_ones_older_first(backend, shares, k, groups, scores):
    """Rows are empty, hold fewer entries than there are shares, wrap in some of the shares, and many times."""
    total = torch.tensor([79, 0, 300, 1, 161, 4, 83, 7, 2**40 + 1])
    rows = torch.tensor([8, 3, 0, 5, 2, 1, 6, 4])[: BATCH * groups]
    found, slots, candidates = drawn(shares, k, rows, total, scores)
    with uninitialised_is_nan():
        merged = knn_merge(found, slots, rows, total, SIZE, backend=backend)
    assert_merged(candidates, slots, *merged)


@on_every_backend
@pytest.mark.parametrize("total", [130, 6, 0])
@pytest.mark.parametrize("empty", [(0,), (2,), (0, 1), (0, 1, 2)])
def test_shares_that_found_nothing(backend, empty, total):
    """Their entries may have been cleared, or not be finite."""
    rows, totals = torch.tensor([1, 0]), torch.full((2,), total)
    found, slots, candidates = drawn(3, 6, rows, totals, FEW_SCORES, empty)
    with uninitialised_is_nan():
        merged = knn_merge(found, slots, rows, totals, SIZE, backend=backend)
    assert_merged(candidates, slots, *merged)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("length", "k"), [(45, 100), (3, 2500)])
def test_more_candidates_than_a_program_takes(backend, length, k, dtype):
    scores = torch.randn(2, 1, 2, length, k, generator=seeded(0)).to(dtype).sort(dim=-1, descending=True).values
    slots = torch.arange(k, dtype=torch.int32).expand(scores.shape)
    with uninitialised_is_nan():
        best, entries, _ = knn_merge(scores, slots, torch.tensor([0]), torch.tensor([2 * k]), k, backend=backend)
    by_age = scores.movedim(0, -1).flatten(-2)  # entries 0, 1, ...: a share's slot is its entry
    expected, order = by_age.sort(dim=-1, descending=True, stable=True)
    assert best.dtype == dtype and torch.equal(best, expected[..., :k])
    assert torch.equal(entries, order[..., :k])


@on_every_backend
def test_entries_of_the_largest_ring_there_can_be(backend):
    """Slots are int32; how far entries lie apart need not be."""
    size = 2**31 - 1
    slots = torch.tensor([0, size - 1], dtype=torch.int32).expand(3, 1, 1, 1, 2)
    scores = torch.zeros(slots.shape)
    _, entries, places = knn_merge(scores, slots, torch.tensor([0]), torch.tensor([3 * size]), size, backend=backend)
    assert entries.flatten().tolist() == [0, 1]
    assert places.flatten(1).tolist() == [[0, 2], [1, 2], [2, 2]]


@pytest.mark.parametrize("backend", [backend for backend in live_backends("knn_merge") if backend != "triton"])
def test_equal_ones_may_come_in_any_order_to_some_backends(monkeypatch, backend):
    """That is how Faiss finds them, whether it is named or the environment names it."""
    scores = torch.ones(2, 1, 1, 1, 4)
    slots = torch.tensor([[3, 0, 2, 1], [1, 3, 2, 0]], dtype=torch.int32).reshape(scores.shape)
    monkeypatch.setenv("MEMTRANS_BACKEND", backend)
    for named in (backend, "auto"):
        _, entries, places = knn_merge(scores, slots, torch.tensor([0]), torch.tensor([8]), 4, backend=named)
        assert entries.flatten().tolist() == [0, 1, 2, 3]
        assert places.flatten(1).tolist() == [[4, 0, 4, 2], [3, 4, 4, 1]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"slots": torch.zeros(2, 1, 2, 3, 5, dtype=torch.int32)}, r"slots must have shape .* got \(2, 1, 2, 3, 5\)"),
        ({"slots": torch.zeros(2, 1, 2, 3, 4)}, "slots must be torch.int32, got torch.float32"),
        ({"rows": torch.zeros(1)}, "rows must be torch.int64, got torch.float32"),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, "query heads must be a positive multiple of G=3, got 2"),
        ({"total": torch.zeros(2, 1, dtype=torch.int64)}, r"total must have shape \(R\), got \(2, 1\)"),
        ({"total": torch.zeros(2, dtype=torch.int32)}, "total must be torch.int64, got torch.int32"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"backend": "fastest"}, "backend must be one of .*, got 'fastest'"),
        pytest.param({"size": 4}, r"slots must be in \[-1, 3\]", marks=pytest.mark.cpu),
        pytest.param({"rows": torch.tensor([2])}, r"rows must be in \[0, 1\], got \[2\]", marks=pytest.mark.cpu),
        pytest.param({"total": torch.tensor([9, -1])}, "total must be at least 0", marks=pytest.mark.cpu),
        pytest.param(
            {"scores": torch.arange(48.0).reshape(2, 1, 2, 3, 4)}, "scores must be best first", marks=pytest.mark.cpu
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changed, message):
    given = {
        "scores": torch.zeros(2, 1, 2, 3, 4),
        "slots": torch.full((2, 1, 2, 3, 4), 4, dtype=torch.int32),
        "rows": torch.zeros(1, dtype=torch.int64),
        "total": torch.full((2,), 10),
        "size": 8,
    }
    with pytest.raises((ValueError, TypeError), match=message):
        knn_merge(**{**given, **changed})
