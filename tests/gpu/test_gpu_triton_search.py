"""The Triton search is exact in every width, dtype and layout that it takes, whatever the keys hold."""

from __future__ import annotations

import pytest
import torch
from helpers.devices import seeded
from helpers.rings import assert_exact, memory, search
from torch import Tensor

from memtrans_kernels import knn_search
from memtrans_kernels.impl.triton import knn_search as triton_search

pytestmark = pytest.mark.gpu

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KINDS = ("runs", "clusters", "vocabulary", "periodic", "equal")
FEW_AND_MANY = pytest.mark.parametrize("length", [1, 90])  # 2 queries of a row, and more than one program holds


def keys_of(count: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=seeded(seed)).to(dtype)


def hard_keys(kind: str, count: int, width: int, dtype: torch.dtype) -> Tensor:
    """Keys as text makes them: alike in a row, alike far apart, the same again and again."""
    random = keys_of(count, width, torch.float32)
    at_random = torch.randint(64, (count,), generator=seeded(3))
    keys = {
        "runs": lambda: random[: count // 40 + 1].repeat_interleave(40, dim=0)[:count] + 0.01 * random,
        "clusters": lambda: random[at_random] + 0.02 * random,
        "vocabulary": lambda: random[at_random],
        "periodic": lambda: random[torch.arange(count) % 100],
        "equal": lambda: random[:1].expand(count, width),
    }
    return keys[kind]().to(dtype)


def check(entries, capacity, k, *, spare=0, heads=2, length=1, groups=1, rows=None, hidden=INF) -> None:
    """Searches rows of a ring for random queries and checks every answer."""
    held = memory(entries, capacity, spare, hidden=hidden)
    rows = list(range(held.rows)) if rows is None else rows
    width, dtype = held.keys.shape[-1], held.keys.dtype
    query = torch.randn(len(rows) // groups, heads, length, width, generator=seeded(1)).to(dtype)
    scores, slots = search(query, held, k, "triton", rows)
    assert_exact(query, held, rows, scores, slots, k)
    again = search(query, held, k, "triton", rows)
    assert torch.equal(scores, again[0]) and torch.equal(slots, again[1]), "the same inputs give the same bits"


@FEW_AND_MANY
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 24, 64, 80, 128, 200, 256, 264, 768, 2048])
def test_every_width_and_dtype(width: int, dtype: torch.dtype, length: int) -> None:
    check([(0, keys_of(count, width, dtype, count)) for count in (0, 1, 700, 1500)], 1000, 32, spare=64, length=length)


@FEW_AND_MANY
@pytest.mark.parametrize("k", [1, 2, 17, 33, 128, 255, 256])
def test_every_number_of_neighbours_around_what_a_row_holds(k: int, length: int) -> None:
    entries = [(0, keys_of(count, 64, torch.float16, count)) for count in (0, 1, k - 1, k, k + 1, 611, 900)]
    check(entries, 611, k, spare=7, length=length)


@FEW_AND_MANY
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_keys_that_are_alike_or_equal(kind: str, dtype: torch.dtype, length: int) -> None:
    check([(0, hard_keys(kind, 5000, 64, dtype)), (40, hard_keys(kind, 900, 64, dtype))], 4000, 32, length=length)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_that_are_alike_in_a_memory_of_three_levels(kind: str) -> None:
    check([(0, hard_keys(kind, 150000, 16, torch.float16))], 140000, 40, spare=5, length=3)


@pytest.mark.parametrize("seed", range(30))
def test_drawn_searches(seed: int) -> None:
    """Any kind of keys, dtype, width, length and K; rows picked, groups, cleared rows, wrapped rings."""
    draw = torch.Generator().manual_seed(seed)

    def among(*choices):
        return choices[int(torch.randint(len(choices), (), generator=draw, device="cpu"))]

    width, dtype, capacity = among(5, 16, 64, 128), among(*DTYPES), among(1, 60, 130, 1025, 3000)
    kinds = ("random", *KINDS)
    entries = []
    for _ in range(4):
        kind, count = among(*kinds), among(0, capacity, capacity + 33, 2 * capacity + 5)
        keys = (
            keys_of(count, width, dtype, seed) if kind == "random" else hard_keys(kind, max(count, 100), width, dtype)
        )
        keys = keys[:count].clone()
        if count and among(True, False):
            keys[torch.rand(count, generator=seeded(seed)) < 0.1, 0] = among(NAN, INF, -INF)
        entries.append((among(0, count // 3), keys))
    check(
        entries, capacity, among(1, 16, 40, 200), spare=among(0, 9), heads=4, length=among(1, 20, 70), groups=2,
        rows=[3, 0, 2, 1], hidden=among(NAN, INF, 1e4),
    )  # fmt: skip


@FEW_AND_MANY
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("hidden", [NAN, INF, 1e4])
def test_keys_that_are_not_finite_are_never_retrieved(dtype: torch.dtype, hidden: float, length: int) -> None:
    keys = keys_of(1500, 64, dtype)
    for number, seed in ((NAN, 3), (INF, 4), (-INF, 5)):
        keys[torch.rand(1500, generator=seeded(seed)) < 0.2, seed] = number
    entries = [(0, keys), (0, torch.full_like(keys, NAN)), (100, keys[:200])]
    check(entries, 1200, 32, spare=9, length=length, hidden=hidden)


@FEW_AND_MANY
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float16, 200.0),
        (torch.float16, 1e-6),
        (torch.bfloat16, 1e15),
        (torch.float32, 1e15),
        (torch.float32, 1e-15),
    ],
)
def test_huge_tiny_and_zero_keys(dtype: torch.dtype, scale: float, length: int) -> None:
    keys = (keys_of(1100, 64, torch.float32) * scale).to(dtype)
    signed_zeros = torch.zeros(800, 64, dtype=dtype) * keys_of(800, 64, dtype, 6).sign()
    check([(0, keys), (0, signed_zeros)], 1000, 20, length=length)


@FEW_AND_MANY
def test_finite_keys_whose_scores_overflow_are_retrieved(length: int) -> None:
    keys = torch.tensor([[1.0] * 24, [3e38] * 24, [INF] * 24, [-3e38] * 24])
    held = memory([(0, keys)], 4)
    scores, slots = search(torch.full((1, 1, length, 24), 2.0), held, 4, "triton")
    assert slots[0, 0].tolist() == [[1, 0, -1, -1]] * length
    assert scores[0, 0].tolist() == [[INF, 48.0, -INF, -INF]] * length


def test_every_output_is_written() -> None:
    """With deterministic algorithms torch fills fresh memory with NaN and the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for length in (1, 100):
            check([(0, keys_of(3, 64, torch.float16)), (0, keys_of(400, 64, torch.float16))], 300, 32, length=length)
    finally:
        torch.use_deterministic_algorithms(False)


def test_chunks_of_queries_are_searched_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    held = memory([(0, keys_of(700, 64, torch.float16)), (0, keys_of(90, 64, torch.float16))], 500)
    query = torch.randn(2, 3, 150, 64, generator=seeded(1)).half()
    whole = search(query, held, 32, "triton")
    monkeypatch.setattr(triton_search, "WORKSPACE_BYTES", 1 << 18)
    parts = search(query, held, 32, "triton")
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])
    assert_exact(query, held, [0, 1], *parts, 32)


def test_a_search_keeps_within_its_workspace() -> None:
    held = memory([(0, keys_of(70000, 64, torch.float16))], 65536)
    query = torch.randn(1, 8, 8192, 64, generator=seeded(1)).half()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    scores, slots = search(query, held, 32, "triton")
    rest = scores.nbytes + slots.nbytes + (8 << 20)  # the allocator gives up to a megabyte more for each tensor
    assert torch.cuda.max_memory_allocated() - before <= triton_search.WORKSPACE_BYTES + rest


@FEW_AND_MANY
def test_a_captured_search_follows_the_cursors(length: int) -> None:
    """Nothing of a replay was decided on the host."""
    held = memory([(0, keys_of(900, 64, torch.float16))] * 2, 700, 100, hidden=1.0)
    query = torch.randn(2, 2, length, 64, generator=seeded(1)).half()
    arguments = (query, held.keys, torch.tensor([0, 1]), held.start, held.cursor, held.capacity, 32)
    knn_search(*arguments, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = knn_search(*arguments, backend="triton")
    held.start += torch.tensor([100, 790])
    held.cursor += torch.tensor([100, 0])
    graph.replay()
    expected = knn_search(*arguments, backend="triton")
    assert torch.equal(captured[0], expected[0]) and torch.equal(captured[1], expected[1])
    assert (captured[1][0] >= 0).all()


def test_a_query_that_is_not_a_number_finds_nothing_and_leaves_the_others_alone() -> None:
    held = memory([(0, keys_of(900, 64, torch.float16))], 900)
    for length in (2, 100):
        query = torch.randn(1, 1, length, 64, generator=seeded(1)).half()
        expected, _ = search(query, held, 8, "triton")
        query[0, 0, 1] = NAN
        scores, slots = search(query, held, 8, "triton")
        assert (slots[0, 0, 1] == -1).all() and (scores[0, 0, 1] == -INF).all()
        assert torch.equal(scores[0, 0, 0], expected[0, 0, 0])


def test_a_large_memory_and_many_queries() -> None:
    entries = [(0, keys_of(70000, 64, torch.float16)), (9, keys_of(66000, 64, torch.float16, 1))]
    check(entries, 65536, 32, spare=512, length=500)
