"""The Hopper search is exact in every width, dtype and layout that it takes, from one query to many."""

from __future__ import annotations

import pytest
import torch
from helpers.devices import about_the_cuda_module, seeded
from helpers.rings import assert_exact, memory, search

from memtrans_kernels import knn_search, native
from memtrans_kernels.backends import SEARCH_WIDTHS

pytestmark = [pytest.mark.gpu, about_the_cuda_module]

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float16, torch.bfloat16)


def keys_of(count: int, width: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=seeded(seed)).to(dtype)


def check(entries, capacity, k, *, spare=0, heads=2, length=1, groups=1, rows=None, hidden=INF) -> None:
    """Searches rows of a ring for random queries and checks every answer."""
    held = memory(entries, capacity, spare, hidden=hidden)
    rows = list(range(held.rows)) if rows is None else rows
    width, dtype = held.keys.shape[-1], held.keys.dtype
    query = torch.randn(len(rows) // groups, heads, length, width, generator=seeded(1)).to(dtype)
    scores, slots = search(query, held, k, "native", rows)
    assert_exact(query, held, rows, scores, slots, k)
    again = search(query, held, k, "native", rows)
    assert torch.equal(scores, again[0]) and torch.equal(slots, again[1]), "the same inputs give the same bits"


@pytest.mark.parametrize("length", [1, 70])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", SEARCH_WIDTHS)
def test_every_width_and_dtype(width: int, dtype: torch.dtype, length: int) -> None:
    entries = [(0, keys_of(count, width, dtype, count)) for count in (0, 1, 700, 1500)]
    check(entries, 1000, 32, spare=64, length=length)


@pytest.mark.parametrize(
    ("dtype", "query_dtype", "heads"),
    [
        (torch.float16, torch.bfloat16, 8),  # up to 8 queries of a row the kernel rounds them
        (torch.bfloat16, torch.float16, 3),
        (torch.float16, torch.float32, 3),
        (torch.bfloat16, torch.float32, 8),
        (torch.float16, torch.float64, 3),  # else they are rounded before
        (torch.float16, torch.float32, 16),
    ],
)
def test_queries_of_another_dtype_are_rounded_to_the_keys(dtype, query_dtype, heads) -> None:
    held = memory([(0, keys_of(count, 96, dtype, count)) for count in (700, 90)], 500, 12, hidden=INF)
    query = torch.randn(2, heads, 1, 96, generator=seeded(1), dtype=torch.float64).to(query_dtype)
    scores, slots = search(query, held, 32, "native")
    expected = search(query.to(dtype), held, 32, "native")
    assert torch.equal(scores, expected[0]) and torch.equal(slots, expected[1])
    assert_exact(query.to(dtype), held, [0, 1], scores, slots, 32)


def test_queries_of_another_dtype_need_no_alignment() -> None:
    held = memory([(0, keys_of(700, 64, torch.float16))], 500)
    numbers = torch.randn(4 * 64 + 1, generator=seeded(1))
    query = numbers[1:].reshape(1, 4, 1, 64)
    assert query.data_ptr() % 16
    scores, slots = search(query, held, 32, "native")
    assert_exact(query.half(), held, [0], scores, slots, 32)


def test_the_operator_refuses_many_queries_of_another_dtype() -> None:
    assert native.load("cuda"), "no other test of this process may have searched"
    held = memory([(0, keys_of(40, 64, torch.float16))], 40)
    arguments = (held.keys, torch.tensor([0]), held.start, held.cursor, 40, 4)
    with pytest.raises(RuntimeError, match="query must be of the keys' dtype where a row has more than 8 queries"):
        torch.ops.memtrans.native_knn_search(torch.randn(1, 9, 1, 64), *arguments)


def test_single_queries_of_a_memory_that_several_blocks_share() -> None:
    check([(0, keys_of(40000, 64, torch.float16))], 36000, 32, spare=5)


def test_single_queries_of_more_groups_than_a_block_holds_at_once_and_of_equal_keys() -> None:
    """Of 70,000 keys a block finds 4,375 maxima; where all keys are equal all of them reach the bound."""
    distinct = keys_of(70000, 64, torch.float16)
    check([(0, distinct[:1].expand(70000, 64)), (0, distinct)], 70000, 32, heads=8, rows=[0, 1] * 9)


@pytest.mark.parametrize("k", [32, 128])
def test_single_queries_of_more_equal_keys_than_a_block_scores_at_once(k: int) -> None:
    """375 groups of 16 slots reach the bound; 192 are scored together."""
    check([(0, keys_of(1, 64, torch.float16).expand(6000, 64))], 6000, k)


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("k", [1, 2, 31, 33, 100, 128])
def test_every_number_of_neighbours_around_what_a_row_holds(k: int, length: int) -> None:
    entries = [(0, keys_of(count, 64, torch.float16, count)) for count in (0, 1, k - 1, k, k + 1, 611, 900)]
    check(entries, 611, k, spare=7, length=length)


@pytest.mark.parametrize("length", [1, 300])
def test_rows_picked_and_permuted_groups_and_cleared_rows(length: int) -> None:
    counts = (500, 37, 999, 0, 4000, 2500)
    entries = [(count // 3, keys_of(count, 128, torch.bfloat16, count)) for count in counts]
    check(entries, 777, 16, spare=33, heads=4, length=length, groups=2, rows=[4, 0, 5, 2])


@pytest.mark.parametrize("length", [1, 64])
def test_keys_equal_bit_for_bit_come_older_first(length: int) -> None:
    distinct = keys_of(5, 64, torch.float16)
    entries = [(0, distinct[torch.randint(5, (2000,), generator=seeded(2))]), (0, distinct[:1].expand(900, 64))]
    check(entries, 1300, 32, spare=50, length=length)


@pytest.mark.parametrize(("copies", "other"), [(range(4096), 5000), (range(4096, 8192), 17)])
def test_equal_keys_come_older_first_where_two_blocks_share_a_row_and_one_gives_up(copies: range, other: int) -> None:
    """Half of the keys are one key, so that block's lists overflow and the query is searched again in another way."""
    keys = keys_of(8192, 64, torch.float16)
    keys[copies.start : copies.stop] = keys[other]
    query = keys[other] + 0.1 * keys_of(64, 64, torch.float16, seed=1)[None, None]
    _, slots = search(query, memory([(0, keys)], 8192), 32, "native")
    assert (slots == torch.tensor(sorted([*copies, other])[:32], device=slots.device)).all()


def test_rows_and_cursors_may_have_strides() -> None:
    held = memory([(0, keys_of(count, 64, torch.float16, count)) for count in (300, 20, 500)], 400, hidden=INF)
    query = torch.randn(2, 2, 3, 64, generator=seeded(1)).half()
    rows = torch.tensor([2, 9, 0, 9])[::2]
    start, cursor = (torch.stack((place, place + 7), dim=1)[:, 0] for place in (held.start, held.cursor))
    scores, slots = knn_search(query, held.keys, rows, start, cursor, held.capacity, 16, backend="native")
    assert_exact(query, held, [2, 0], scores, slots, 16)


@pytest.mark.parametrize("length", [1, 64])
@pytest.mark.parametrize("hidden", [NAN, INF, 1e4])
def test_keys_that_are_not_finite_are_never_retrieved_whatever_hidden_slots_hold(length: int, hidden: float) -> None:
    keys = keys_of(1500, 64, torch.float16)
    for number, seed in ((NAN, 3), (INF, 4), (-INF, 5)):
        keys[torch.rand(1500, generator=seeded(seed)) < 0.2, seed] = number
    check(
        [(0, keys), (0, torch.full_like(keys, NAN)), (100, keys[:200])], 1200, 32, spare=9, length=length, hidden=hidden
    )


@pytest.mark.parametrize("length", [1, 64])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 200.0), (torch.float16, 1e-6), (torch.bfloat16, 1e15)])
def test_huge_tiny_and_zero_keys(dtype: torch.dtype, scale: float, length: int) -> None:
    keys = (keys_of(1100, 64, torch.float32) * scale).to(dtype)
    signed_zeros = torch.zeros(800, 64, dtype=dtype) * keys_of(800, 64, dtype, 6).sign()
    check([(0, keys), (0, signed_zeros)], 1000, 20, length=length)


@pytest.mark.parametrize("length", [1, 150])
@pytest.mark.parametrize("order", ["ascending", "descending", "topics"])
def test_keys_that_get_better_all_the_time_or_cluster_in_time(order: str, length: int) -> None:
    """What a threshold from a sample is worst at."""
    direction = torch.nn.functional.normalize(torch.randn(64, generator=seeded(7)), dim=0)
    noise = 0.1 * torch.randn(20000, 64, generator=seeded(8))
    rank = torch.linspace(-5, 5, 20000)
    rank = {"ascending": rank, "descending": -rank, "topics": 5 * (torch.arange(20000) // 500 % 7 == 3)}[order]
    check([(0, (rank[:, None] * direction + noise).half())], 20000, 32, length=length)


@pytest.mark.parametrize("k", [32, 128])
@pytest.mark.parametrize("count", [6000, 20000])  # one block a query, or two
def test_single_queries_among_neighbours_that_are_alike(count: int, k: int) -> None:
    """Nearly all of the 16 slots of each group that holds a neighbour reach the bound, more than are ranked at once."""
    runs = keys_of(count // 40, 64, torch.float32).repeat_interleave(40, dim=0)
    check([(0, (runs + 0.01 * torch.randn(count, 64, generator=seeded(8))).half())], count, k, heads=3)


def test_a_query_that_is_not_a_number_finds_nothing_and_leaves_the_others_alone() -> None:
    held = memory([(0, keys_of(900, 64, torch.float16))], 900)
    for length in (2, 100):
        query = torch.randn(1, 1, length, 64, generator=seeded(1)).half()
        expected, _ = search(query, held, 8, "native")
        query[0, 0, 1] = NAN
        scores, slots = search(query, held, 8, "native")
        assert (slots[0, 0, 1] == -1).all() and (scores[0, 0, 1] == -INF).all()
        assert torch.equal(scores[0, 0, 0], expected[0, 0, 0])


def test_every_output_is_written() -> None:
    """With deterministic algorithms torch fills fresh memory with NaN and the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        check([(0, keys_of(3, 64, torch.float16)), (0, keys_of(400, 64, torch.float16))], 300, 32, length=100)
        check([(0, keys_of(3, 64, torch.float16)), (0, keys_of(400, 64, torch.float16))], 300, 32)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_large_memory_and_many_queries() -> None:
    check(
        [(0, keys_of(70000, 64, torch.float16)), (9, keys_of(66000, 64, torch.float16, 1))],
        65536,
        32,
        spare=512,
        length=500,
    )


def test_more_queries_than_one_launch_takes() -> None:
    held = memory([(0, keys_of(40, 32, torch.float16))], 40)
    query = torch.randn(1, 1, 2**25 + 300, 32, dtype=torch.float16)
    scores, slots = search(query, held, 2, "native")
    for part in (slice(0, 50), slice(2**25 - 50, 2**25 + 50), slice(-50, None)):
        assert_exact(query[:, :, part], held, [0], scores[:, :, part], slots[:, :, part], 2)


def test_more_single_queries_than_a_grid_is_high() -> None:
    held = memory([(0, keys_of(40, 32, torch.float16))], 40)
    rows = [0] * 9000
    query = torch.randn(len(rows), 8, 1, 32, generator=seeded(1)).half()
    scores, slots = search(query, held, 2, "native", rows)
    for part in (slice(0, 2), slice(8190, 8194), slice(-2, None)):  # 65,535 queries end among these
        assert_exact(query[part], held, rows[part], scores[part], slots[part], 2)


@pytest.mark.parametrize(("width", "k", "message"), [(48, 4, "D must be one of"), (64, 129, "k must be at most 128")])
def test_what_it_does_not_take_is_an_error_by_name_and_plain_pytorch_by_auto(width: int, k: int, message: str) -> None:
    held = memory([(0, keys_of(300, width, torch.float16))], 300)
    query = torch.randn(1, 1, 3, width, generator=seeded(1)).half()
    with pytest.raises(RuntimeError, match=message):
        search(query, held, k, "native")
    arguments = (query, held.keys, torch.tensor([0]), held.start, held.cursor, 300, k)
    scores, slots = knn_search(*arguments)
    assert_exact(query, held, [0], scores, slots, k)
