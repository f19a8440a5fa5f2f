"""backend="faiss": exact up to the order of equal keys, on the CPU by a flat index, on a GPU through csrc/faiss.

The bridge returns what Faiss finds in each of the two pieces of a window; a stand-in for it on the CPU shows that these
are put together rightly.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.devices import DEVICE, default_dtype, live_backends, seeded
from helpers.rings import INF, assert_exact, memory, search
from torch import Tensor

from memtrans_kernels import backends_info, knn_search
from memtrans_kernels.impl.faiss import cpu as faiss_cpu
from memtrans_kernels.impl.faiss import gpu as faiss_gpu

pytestmark = pytest.mark.device

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _live() -> None:
    lines = [line for line in backends_info() if (line.backend, line.device) == ("faiss", DEVICE)]
    assert "faiss" in live_backends("knn_search"), [line.reason for line in lines]


def entries_of(dtype: torch.dtype, width: int = 16) -> list[tuple[int, Tensor]]:
    """(start, keys) of rows that are empty, hold one key, are nearly full, wrapped, and cleared."""
    counts = ((0, 0), (0, 1), (0, 50), (0, 75), (90, 110), (30, 30), (0, 1000), (17, 52))
    return [(start, torch.randn(count, width, generator=seeded(count)).to(dtype)) for start, count in counts]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 5, 51, 64])
@pytest.mark.parametrize(("heads", "groups", "length"), [(1, 1, 1), (4, 2, 3), (2, 2, 40)])
def test_windows_of_all_kinds_are_exact(dtype: torch.dtype, k: int, heads: int, groups: int, length: int) -> None:
    """Hidden slots hold numbers that would win."""
    held = memory(entries_of(dtype), capacity=51, spare=9, hidden=1e3)
    rows = [5, 3, 0, 7, 6, 1, 2, 4]
    query = torch.randn(len(rows) // groups, heads, length, 16, generator=seeded(1))
    scores, slots = search(query, held, k, "faiss", rows)
    assert scores.dtype == torch.float32 and slots.dtype == torch.int32
    assert_exact(query, held, rows, scores, slots, k)


def test_21_16_scores_are_float32_whatever_the_default_is() -> None:
    held, query = memory([(0, torch.randn(9, 16, generator=seeded(0)))], capacity=9), torch.randn(1, 2, 3, 16)
    expected, _ = search(query, held, 4, "faiss")
    with default_dtype(torch.bfloat16):
        scores, _ = search(query, held, 4, "faiss")
    assert scores.dtype == torch.float32 and torch.equal(scores, expected)


@pytest.mark.gpu
def test_a_non_finite_score_is_an_error_on_a_gpu() -> None:
    held = memory([(0, torch.tensor([[1.0, INF], [2.0, 1.0]]))], capacity=2)
    with pytest.raises(RuntimeError, match="backend='faiss' met a score that is not finite"):
        search(torch.ones(1, 1, 1, 2), held, 2, "faiss")


@pytest.mark.gpu
def test_the_search_runs_on_the_current_stream() -> None:
    """Keys written on a side stream, behind work that takes a while, are seen by a search on that stream."""
    stream = torch.cuda.Stream()
    held = memory([(0, torch.zeros(4, 2))], capacity=4)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        held.keys.copy_(torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
        _, slots = search(torch.ones(1, 1, 1, 2), held, 1, "faiss")
        assert slots.flatten().tolist() == [2]


def bfknn_of_both_pieces(
    query: Tensor, keys: Tensor, rows: Tensor, start: Tensor, cursor: Tensor, capacity: int, k: int
) -> tuple[Tensor, Tensor]:
    """What the bridge returns, in Python: scores and positions (2, B, H, N, K), padded as Faiss pads."""
    size, lowest = keys.shape[1], torch.finfo(torch.float32).min
    scores, positions = [], []
    for piece in (0, 1):
        begins, ends = [], []
        for begin, end in zip(start.tolist(), cursor.tolist(), strict=True):
            first = max(0, begin, end - capacity)
            before_the_end = min(end, first + size - first % size)
            begins.append(first if piece == 0 else before_the_end)
            ends.append(before_the_end if piece == 0 else end)
        found, slots = faiss_cpu.knn_search(query, keys, rows, torch.tensor(begins), torch.tensor(ends), size, k)
        by_head = torch.tensor(begins)[rows].reshape(len(query), -1) % size
        by_head = by_head.repeat_interleave(query.shape[1] // by_head.shape[1], dim=1)[..., None, None]
        scores.append(found.masked_fill(slots < 0, lowest))
        positions.append(torch.where(slots < 0, -1, slots - by_head).to(torch.int32))
    return torch.stack(scores), torch.stack(positions)


@pytest.fixture
def stand_in() -> Iterator[None]:
    library = torch.library.Library("memtrans", "IMPL", "CPU")
    library.impl("native_faiss_search", bfknn_of_both_pieces)
    yield
    library._destroy()


@pytest.mark.cpu
@pytest.mark.parametrize("k", [1, 5, 51, 64])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 2), (2, 2)])
@pytest.mark.usefixtures("stand_in")
def test_the_pieces_of_a_wrapped_window_are_put_together(k: int, heads: int, groups: int) -> None:
    held = memory(entries_of(torch.float32), capacity=51, spare=9, hidden=1e3)
    rows = [5, 3, 0, 7, 6, 1, 2, 4]
    query = torch.randn(len(rows) // groups, heads, 3, 16, generator=seeded(1))
    scores, slots = faiss_gpu.knn_search(query, held.keys, torch.tensor(rows), held.start, held.cursor, 51, k)
    assert scores.dtype == torch.float32 and slots.dtype == torch.int32
    assert_exact(query, held, rows, scores, slots, k)


@pytest.mark.cpu
@pytest.mark.usefixtures("stand_in")
def test_the_bridge_refuses_scores_that_are_not_finite() -> None:
    huge = torch.full((1, 2, 2), 3e38)
    arguments = (torch.tensor([0]), torch.tensor([0]), torch.tensor([2]), 2, 1)
    with pytest.raises(RuntimeError, match="backend='faiss' met a score that is not finite"):
        faiss_gpu.knn_search(torch.full((1, 1, 1, 2), 2.0), huge, *arguments)


def test_auto_never_takes_it() -> None:
    order = [line.backend for line in backends_info() if (line.operator, line.device) == ("knn_search", DEVICE)]
    assert order.index("reference") < order.index("faiss")


def test_float64_keys_are_refused_with_the_reason() -> None:
    keys, position = torch.zeros(1, 2, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"backend='faiss' cannot run knn_search on .*float32, not in float64"):
        knn_search(torch.zeros(1, 1, 1, 2), keys, position, position, position, 2, 1, backend="faiss")
