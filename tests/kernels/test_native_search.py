"""The compiled search on the CPU where its work is cut: threads, parts, blocks, tiles."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from helpers import checks
from helpers.devices import threads
from torch import Tensor

from memtrans_kernels import native

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INF = float("inf")


@pytest.fixture(autouse=True)
def _extension() -> None:
    live, reason = native.status()
    assert live, f"the extension must be built for these tests: {reason}"


@pytest.fixture(params=[1, 2, 3], ids=lambda count: f"{count} threads")
def thread_count(request: pytest.FixtureRequest) -> Iterator[int]:
    with threads(request.param):
        yield request.param


def search(query: Tensor, keys: Tensor, cursor: int, capacity: int, k: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """One row: query (Q, D), keys (M + S, D) -> scores and slots (Q, K)."""
    position = torch.zeros(1, dtype=torch.int64)
    arguments = (query[None, None], keys[None], position, position + start, position + cursor, capacity, k)
    scores, slots = native.knn_search(*arguments)
    return scores[0, 0], slots[0, 0]


def random_keys(count: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Keys of which every fifth or so equals another one, and some are not finite."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(count, width, generator=generator)
    copies = torch.rand(count, generator=generator) < 0.2
    keys[copies] = keys[torch.randint(0, count, (count,), generator=generator)][copies]
    keys[torch.rand(count, generator=generator) < 0.01, -1] = INF
    return keys.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 2, 3, 8, 9, 16, 17, 33, 257, 300])
def test_every_cut_of_the_work_is_exact(queries: int, dtype: torch.dtype, thread_count: int) -> None:
    """M = 4500 of 5000 slots, wrapped: more than a part of the keys, a block and a tile, and multiples of none."""
    width, capacity, cursor, k = 37, 4500, 7321, 9
    keys = random_keys(5000, width, dtype)
    query = torch.randn(queries, width, generator=torch.Generator().manual_seed(queries))
    scores, slots = search(query, keys, cursor, capacity, k)

    slots_by_age = torch.arange(cursor - capacity, cursor) % 5000
    shown = slots_by_age[keys[slots_by_age].isfinite().all(-1)]
    order_of = torch.full((5000,), -1)
    order_of[shown] = torch.arange(len(shown))
    order = order_of[slots.long()]
    assert (order >= 0).all(), "an entry that no search may see"
    checks.assert_nearest(query.to(dtype), keys[shown], order, scores, k)
    checks.assert_older_first(keys[shown], order)


@pytest.mark.parametrize("queries", [1, 5, 40])
def test_the_result_does_not_depend_on_the_number_of_threads(queries: int, thread_count: int) -> None:
    keys, query = random_keys(9000, 16, torch.float32), torch.randn(queries, 16)
    scores, slots = search(query, keys, 9000, 9000, 33)
    with threads(1):
        expected_scores, expected_slots = search(query, keys, 9000, 9000, 33)
    assert torch.equal(scores, expected_scores)
    assert torch.equal(slots, expected_slots)


@pytest.mark.parametrize("k", [1, 100, 4999, 5001])
def test_as_many_neighbours_as_there_are_keys(k: int, thread_count: int) -> None:
    keys = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0))
    scores, slots = search(torch.ones(3, 4), keys, 5000, 5000, k)
    checks.assert_nearest(torch.ones(3, 4), keys, slots, scores, k)


@pytest.mark.parametrize("queries", [1, 4, 20])
def test_equal_keys_on_both_sides_of_every_cut_come_older_first(queries: int, thread_count: int) -> None:
    """All keys are one key: the oldest K, although several threads each find K of them."""
    keys = torch.full((6000, 8), 0.25)
    _, slots = search(torch.ones(queries, 8), keys, 6000 + 17, 6000, 12)
    assert slots.tolist() == [list(range(17, 29))] * queries


@pytest.mark.parametrize("queries", [1, 4, 20])
def test_a_finite_key_whose_score_overflows_is_retrieved(queries: int) -> None:
    keys = torch.tensor([[1.0, 1.0], [3e38, 3e38], [INF, 1.0], [-3e38, -3e38]])
    scores, slots = search(torch.full((queries, 2), 2.0), keys, 4, 4, 4)
    assert slots.tolist() == [[1, 0, -1, -1]] * queries
    assert scores.tolist() == [[INF, 4.0, -INF, -INF]] * queries


def test_views_are_searched_in_place() -> None:
    """Keys and values of one storage, queries transposed, index tensors with strides."""
    storage = torch.randn(3, 50, 2, 6, generator=torch.Generator().manual_seed(0))
    query = torch.randn(2, 7, 2, 6, generator=torch.Generator().manual_seed(1)).transpose(1, 2)
    rows, start, cursor = (
        torch.tensor([2, 9, 0, 9])[::2],
        torch.zeros(6, dtype=torch.int64)[::2],
        torch.tensor([50] * 3),
    )
    found = native.knn_search(query, storage[:, :, 0], rows, start, cursor, 40, 5)
    expected = native.knn_search(
        query.contiguous(), storage[:, :, 0].contiguous(), torch.tensor([2, 0]), torch.zeros_like(cursor), cursor, 40, 5
    )
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    columns = storage[:, :, 0].transpose(1, 2).contiguous().transpose(1, 2)
    found = native.knn_search(query, columns, rows, start, cursor, 40, 5)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


KEYS, QUERY, ROWS, POSITIONS = (
    torch.zeros(3, 4, 2),
    torch.zeros(2, 2, 1, 2),
    torch.tensor([0, 2]),
    torch.zeros(3).long(),
)
BAD_INPUTS = {
    "rows must lie in 0..2, got 3": {"rows": torch.tensor([0, 3])},
    "rows must be int64": {"rows": ROWS.int()},
    "rows must have B * G elements": {"rows": torch.tensor([0, 1, 2])},
    "query must have D = 2, got (2, 2, 1, 3)": {"query": torch.zeros(2, 2, 1, 3)},
    "query must have shape (B, H, N, D), got (2, 2)": {"query": torch.zeros(2, 2)},
    "keys must be float32, float16 or bfloat16": {"keys": KEYS.double()},
    "start must have shape (R,) = (3), got (2)": {"start": ROWS},
    "cursor must be int64": {"cursor": POSITIONS.int()},
    "capacity must lie in 1..4, got 5": {"capacity": 5},
    "k must be at least 1, got 0": {"k": 0},
}


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_bad_input_names_the_argument(message: str) -> None:
    arguments = {"query": QUERY, "keys": KEYS, "rows": ROWS, "start": POSITIONS, "cursor": POSITIONS}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        native.knn_search(**{**arguments, "capacity": 4, "k": 2, **BAD_INPUTS[message]})


def test_operator_passes_opcheck() -> None:
    operator = torch.ops.memtrans.native_knn_search.default
    torch.library.opcheck(operator, (QUERY, KEYS, ROWS, POSITIONS, POSITIONS, 4, 2), test_utils="test_schema")
