"""backend="faiss": exact up to the order of equal keys, on the CPU by a flat index, on a GPU through csrc/faiss.

The bridge gives Faiss all slots of a row, with a column that says which may be found; a stand-in for Faiss on the CPU
shows that it says so rightly.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.devices import DEVICE, default_dtype, live_backends, seeded
from helpers.rings import INF, assert_exact, memory, search
from torch import Tensor
from torch.nn.functional import pad

from memtrans_kernels import backends_info, knn_search
from memtrans_kernels.impl.faiss import gpu as faiss_gpu

pytestmark = pytest.mark.device

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _live() -> None:
    lines = [line for line in backends_info() if (line.backend, line.device) == ("faiss", DEVICE)]
    live = "faiss" in live_backends("knn_search")
    if DEVICE == "cuda" and not live:  # the bridge is built where Faiss for GPUs is, and nobody has to have that
        pytest.skip("; ".join(line.reason for line in lines))
    assert live, [line.reason for line in lines]


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
def test_the_search_runs_on_the_current_stream() -> None:
    """Keys written on a side stream, behind work that takes a while, are seen by a search on that stream."""
    stream = torch.cuda.Stream()
    held = memory([(0, torch.zeros(4, 2))], capacity=4)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        held.keys.copy_(torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
        _, slots = search(torch.ones(1, 1, 1, 2), held, 1, "faiss")
        assert slots.flatten().tolist() == [2]


@pytest.mark.gpu
def test_the_host_never_waits_for_the_device() -> None:
    """A wrapped ring, a cleared row, an empty one, a key that is not finite: nothing of it is read back."""
    held = memory(entries_of(torch.float16), capacity=51, spare=9, hidden=1e3)
    query, rows = torch.randn(4, 4, 3, 16), torch.tensor([5, 3, 0, 7, 6, 1, 2, 4])
    arguments = (query, held.keys, rows, held.start, held.cursor, 51, 5)
    knn_search(*arguments, backend="faiss")  # loads libraries, and lets them have their workspaces
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scores, slots = knn_search(*arguments, backend="faiss")
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert_exact(query, held, rows.tolist(), scores, slots, 5)


def bfknn(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What the bridge returns, in Python: scores and positions (sets, Q, K), padded as Faiss pads."""
    assert query.is_contiguous() and keys.is_contiguous() and keys.stride(1) * keys.element_size() % 16 == 0
    assert query.dtype == keys.dtype and keys.isfinite().all()
    found = min(k, keys.shape[1])
    scores, positions = (query.float() @ keys.float().transpose(1, 2)).topk(found, dim=-1)
    more = (0, k - found)
    lowest = torch.finfo(torch.float32).min
    return pad(scores, more, value=lowest), pad(positions.to(torch.int32), more, value=-1)


@pytest.fixture
def stand_in() -> Iterator[None]:
    library = torch.library.Library("memtrans", "IMPL", "CPU")
    library.impl("native_faiss_search", bfknn)
    yield
    library._destroy()


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 5, 51, 64])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 2), (2, 2)])
@pytest.mark.parametrize("hidden", [1e3, INF, float("nan")])
@pytest.mark.usefixtures("stand_in")
def test_the_bridge_hides_what_a_search_must_not_see(
    dtype: torch.dtype, k: int, heads: int, groups: int, hidden: float
) -> None:
    """Through scores below zero, too: more neighbours are asked for than score above it."""
    held = memory(entries_of(dtype), capacity=51, spare=9, hidden=hidden)
    rows = [5, 3, 0, 7, 6, 1, 2, 4]
    query = torch.randn(len(rows) // groups, heads, 3, 16, generator=seeded(1))
    scores, slots = faiss_gpu.knn_search(query, held.keys, torch.tensor(rows), held.start, held.cursor, 51, k)
    assert scores.dtype == torch.float32 and slots.dtype == torch.int32
    assert_exact(query, held, rows, scores, slots, k)


@pytest.mark.cpu
@pytest.mark.usefixtures("stand_in")
def test_the_bridge_never_finds_keys_that_are_not_finite() -> None:
    keys = torch.randn(9, 4, generator=seeded(1))
    keys[2, 1], keys[5], keys[7, 0] = torch.nan, INF, -INF
    held = memory([(0, keys)], capacity=9)
    query = torch.randn(1, 2, 3, 4, generator=seeded(2))
    scores, slots = faiss_gpu.knn_search(query, held.keys, torch.tensor([0]), held.start, held.cursor, 9, 9)
    assert_exact(query, held, [0], scores, slots, 9)
    assert (slots[..., 6:] == -1).all() and (scores[..., 6:] == -INF).all()


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_column_of_the_bridge_costs_no_bit_of_a_score(dtype: torch.dtype) -> None:
    query, keys = (
        torch.randn(1, 2, 5, generator=seeded(1)).to(dtype),
        torch.randn(1, 3, 5, generator=seeded(2)).to(dtype),
    )
    seen = torch.tensor([[True, False, True]])
    wide_query, wide_keys = faiss_gpu.with_column(query, keys, seen)
    products = wide_query.double() @ wide_keys.double().transpose(1, 2)
    assert torch.equal(products[..., [0, 2]], (query.double() @ keys.double().transpose(1, 2))[..., [0, 2]])
    assert (products[..., 1] == -(faiss_gpu.COLUMN[dtype] ** 2)).all()


def test_auto_never_takes_it() -> None:
    order = [line.backend for line in backends_info() if (line.operator, line.device) == ("knn_search", DEVICE)]
    assert order.index("reference") < order.index("faiss")


def test_float64_keys_are_refused_with_the_reason() -> None:
    keys, position = torch.zeros(1, 2, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"backend='faiss' cannot run knn_search on .*float32, not in float64"):
        knn_search(torch.zeros(1, 1, 1, 2), keys, position, position, position, 2, 1, backend="faiss")
