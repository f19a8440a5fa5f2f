"""Exact search: the K largest inner products among the visible entries of a row, older first among equals."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from helpers import checks
from helpers.devices import DEVICE, live_backends, seeded
from helpers.rings import INF, assert_exact, memory, search
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memtrans_kernels import knn_search
from memtrans_kernels.impl.reference import knn_search as reference

pytestmark = pytest.mark.device

# The Hopper search takes few widths and dtypes, Faiss on a GPU finite keys only: they have tests of their own.
BACKENDS = [backend for backend in live_backends("knn_search") if DEVICE == "cpu" or backend not in ("native", "faiss")]
ORDERED = [backend for backend in BACKENDS if backend != "faiss"]  # exempt from the order of equal keys and from bits
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # where every step of a kernel takes milliseconds
# Launches of a few microseconds' work take the time on a GPU.
EXAMPLES = 100 if DEVICE == "cpu" and not INTERPRETED else 10
COUNTS, LENGTHS = ([0, 4, 10, 100], [1, 5]) if INTERPRETED else ([0, 1, 3, 4, 5, 8, 9, 10, 11, 100], [1, 2, 5, 64])
COMPILED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = (*COMPILED_DTYPES, torch.float64)
NAN = float("nan")

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
on_ordered_backends = pytest.mark.parametrize("backend", ORDERED)


def dtypes(backend: str) -> tuple[torch.dtype, ...]:
    """Of keys; only the reference computes in float64."""
    return DTYPES if backend == "reference" else COMPILED_DTYPES


def draw_keys(data: st.DataObject, count: int, width: int, dtype: torch.dtype) -> Tensor:
    """Keys (C, D): some huge or tiny, many equal to an older one, zeros of both signs, some not finite."""
    generator = seeded(data.draw(st.integers(0, 2**32), "seed"))
    magnitude = data.draw(st.sampled_from([1.0, 1.0, 100.0, 1e-3] if dtype == torch.float16 else [1.0, 1e15, 1e-15]))
    keys = torch.randn(count, width, generator=generator) * magnitude
    if count and data.draw(st.booleans(), "duplicates"):
        keys = keys[torch.randint(0, max(1, count // 3), (count,), generator=generator)]
    chance = torch.rand(count, width, generator=generator)
    keys = keys.masked_fill(chance < 0.1, 0.0).masked_fill(chance < 0.05, -0.0)
    for number in data.draw(st.sampled_from([(), (NAN,), (INF, -INF, NAN)]), "not finite"):
        keys = keys.masked_fill(torch.rand(count, width, generator=generator) < 0.05, number)
    return keys.to(dtype)


@on_ordered_backends
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_searches_are_exact(backend: str, data: st.DataObject) -> None:
    """Rows picked and permuted, groups, start > 0, wrapped rings, odd M, spare slots, K beyond M, all dtypes."""
    dtype, width = (
        data.draw(st.sampled_from(dtypes(backend)), "dtype"),
        data.draw(st.sampled_from([1, 2, 5, 16, 33]), "D"),
    )
    capacity, spare = data.draw(st.integers(1, 40), "M"), data.draw(st.sampled_from([0, 1, 7]), "S")
    k = data.draw(st.integers(1, capacity + 2), "K")
    batch, groups = data.draw(st.integers(1, 3), "B"), data.draw(st.sampled_from([1, 2]), "G")
    heads, length = groups * data.draw(st.integers(1, 2), "H / G"), data.draw(st.integers(0, 4), "N")
    lengths = st.sampled_from([0, 1, k - 1, k, k + 1, capacity, capacity + 1, capacity + spare, 2 * capacity + 3])
    entries = []
    for _ in range(batch * groups + data.draw(st.integers(0, 2), "rows beside")):
        count = data.draw(lengths, "length")
        start = data.draw(st.integers(0, count) | st.just(0), "start")
        entries.append((start, draw_keys(data, count, width, dtype)))
    held = memory(entries, capacity, spare, hidden=data.draw(st.sampled_from([INF, NAN, 1e4])))
    rows = data.draw(st.permutations(range(held.rows)), "rows")[: batch * groups]
    query = torch.randn(batch, heads, length, width, generator=seeded(1))

    scores, slots = search(query, held, k, backend, rows)

    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert slots.dtype == torch.int32
    assert_exact(query, held, rows, scores, slots, k)


@on_every_backend
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("start", [0, 2])
def test_lengths_around_k_around_m_and_just_wrapped(backend: str, count: int, spare: int, start: int) -> None:
    keys = torch.randn(count, 5, generator=seeded(count))
    held = memory([(min(start, count), keys)], capacity=9, spare=spare)
    query = torch.randn(1, 2, 3, 5, generator=seeded(0))
    scores, slots = search(query, held, 4, backend)
    assert_exact(query, held, [0], scores, slots, 4)


@on_every_backend
def test_more_neighbours_than_memories_are_padded(backend: str) -> None:
    held = memory([(0, torch.tensor([[1.0], [3.0], [2.0]]))], capacity=4)
    scores, slots = search(torch.ones(1, 1, 1, 1), held, 6, backend)
    assert slots.tolist() == [[[[1, 2, 0, -1, -1, -1]]]]
    assert scores.tolist() == [[[[3.0, 2.0, 1.0, -INF, -INF, -INF]]]]


@on_every_backend
def test_a_cleared_row_shows_only_what_came_after(backend: str) -> None:
    held = memory([(2, torch.tensor([[9.0], [8.0], [1.0], [2.0]]))], capacity=4, hidden=100.0)
    _, slots = search(torch.ones(1, 1, 1, 1), held, 4, backend)
    assert slots.tolist() == [[[[3, 2, -1, -1]]]]


@on_ordered_backends
@pytest.mark.parametrize("width", [1, 3, 17, 64, 128])
@pytest.mark.parametrize("length", LENGTHS)
def test_equal_keys_have_equal_scores_and_come_older_first(backend: str, width: int, length: int) -> None:
    """However a product of matrices rounds at the edges of its tiles. Five different keys, 257 entries."""
    generator = seeded(width)
    keys = torch.randn(5, width, generator=generator)[torch.randint(0, 5, (257,), generator=generator)]
    held = memory([(0, torch.cat((torch.zeros(100, width), keys)))], capacity=257)
    query = torch.randn(1, 1, length, width, generator=generator)
    most = 40 if INTERPRETED else 256 if backend == "triton" else 257  # all of them, but for Triton's limit
    for k in (most, 7):  # and an edge in the middle of equals
        scores, slots = search(query, held, k, backend)
        assert_exact(query, held, [0], scores, slots, k)
        for row in scores[0, 0]:
            assert len(row.unique()) <= 5


@pytest.mark.parametrize(("backend", "dtype"), [(backend, dtype) for backend in BACKENDS for dtype in dtypes(backend)])
def test_a_key_that_is_not_finite_is_never_retrieved(backend: str, dtype: torch.dtype) -> None:
    keys = torch.tensor([[1.0, 0.0], [INF, 0.0], [2.0, 0.0], [NAN, 0.0], [0.0, -INF], [3.0, 0.0]], dtype=dtype)
    held = memory([(0, keys)], capacity=6)
    for query in ([1.0, 0.0], [1.0, 1.0], [0.0, 0.0]):
        _, slots = search(torch.tensor(query).reshape(1, 1, 1, 2), held, 6, backend)
        assert sorted(slots.flatten().tolist()) == [-1, -1, -1, 0, 2, 5]


@on_every_backend
def test_a_query_that_is_not_a_number_finds_nothing_and_leaves_the_others_alone(backend: str) -> None:
    held = memory([(0, torch.randn(7, 3, generator=seeded(0)))], capacity=7)
    query = torch.randn(1, 1, 3, 3, generator=seeded(1))
    expected_scores, expected_slots = search(query, held, 4, backend)
    query[0, 0, 1, 2] = NAN
    scores, slots = search(query, held, 4, backend)
    assert (slots[0, 0, 1] == -1).all()
    assert (scores[0, 0, 1] == -INF).all()
    assert torch.equal(scores[0, 0, [0, 2]], expected_scores[0, 0, [0, 2]])
    assert torch.equal(slots[0, 0, [0, 2]], expected_slots[0, 0, [0, 2]])


@on_ordered_backends
def test_a_score_that_is_not_a_number_is_never_retrieved(backend: str) -> None:
    """Two products that overflow to opposite infinities, between finite keys."""
    held = memory([(0, torch.tensor([[1e30, 1e30], [1.0, 1.0]]))], capacity=2)
    scores, slots = search(torch.tensor([[[[1e30, -1e30]]]]), held, 2, backend)
    assert not scores.isnan().any()
    if backend == "triton" and scores[0, 0, 0, 0] == INF:  # a fused multiply-add stays at the first infinity
        assert slots.flatten().tolist() == [0, 1]
    else:
        assert slots.flatten().tolist() == [1, -1]
        assert scores.flatten().tolist()[1] == -INF


@on_ordered_backends
def test_zero_scores_of_either_sign_tie(backend: str) -> None:
    held = memory([(0, torch.tensor([[-0.0], [0.0], [-0.0], [0.0]]))], capacity=4)
    scores, slots = search(torch.tensor([[[[1.0], [-1.0]]]]), held, 4, backend)
    assert slots[0, 0].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert (scores == 0).all()


@on_every_backend
def test_the_same_inputs_give_the_same_bits(backend: str) -> None:
    held = memory([(0, torch.randn(300, 24, generator=seeded(0)))] * 2, capacity=200)
    query = torch.randn(2, 4, 3 if INTERPRETED else 33, 24, generator=seeded(1))
    first, again = search(query, held, 16, backend), search(query.clone(), held, 16, backend)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@on_ordered_backends
def test_the_query_is_cast_to_the_keys_dtype(backend: str) -> None:
    """1 + 2^-12 is 1 in float16: the tie shows in which dtype the query was read."""
    held = memory([(0, torch.tensor([[1.0, -1.0], [0.5, -0.5]], dtype=torch.float16))], capacity=2)
    scores, slots = search(torch.tensor([[[[1.0 + 2.0**-12, 1.0]]]]), held, 2, backend)
    assert scores.flatten().tolist() == [0.0, 0.0]
    assert slots.flatten().tolist() == [0, 1]


@on_every_backend
def test_search_is_not_differentiated_and_writes_nothing(backend: str) -> None:
    held = memory([(0, torch.randn(5, 3))], capacity=4)
    before = held.keys.clone()
    scores, slots = search(torch.randn(1, 1, 2, 3, requires_grad=True), held, 2, backend)
    assert not scores.requires_grad
    assert not slots.requires_grad
    assert torch.equal(held.keys, before)


class LargestTensor(TorchDispatchMode):
    """Records the size in bytes of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def test_the_reference_never_holds_a_score_for_every_query(monkeypatch: pytest.MonkeyPatch) -> None:
    held = memory([(0, torch.randn(128, 4, generator=seeded(0)))], capacity=128)
    query = torch.randn(1, 1, 2000, 4, generator=seeded(1))
    arguments = (query, held.keys, torch.tensor([0]), held.start, held.cursor, held.capacity, 2)
    whole = reference.knn_search(*arguments)
    monkeypatch.setattr(reference, "SEARCH_BLOCK_BYTES", 1 << 16)
    with LargestTensor() as largest:
        scores, slots = reference.knn_search(*arguments)
    every_score = query.shape[2] * held.capacity * 4
    assert largest.bytes <= 1 << 16 < every_score
    assert torch.equal(slots, whole[1])
    checks.assert_close(scores, whole[0], torch.finfo(torch.float32).eps)


KEYS, QUERY, INT = torch.zeros(2, 5, 3), torch.zeros(2, 4, 6, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"query": torch.zeros(2, 6, 3)},
            ValueError,
            r"query must have shape \(B, H, N, D\) with D=3, got \(2, 6, 3\)",
        ),
        ({"query": torch.zeros(2, 4, 6, 2)}, ValueError, r"query must have .* D=3, got \(2, 4, 6, 2\)"),
        ({"query": QUERY.long()}, TypeError, r"query must be floating point, got torch.int64"),
        ({"query": QUERY.to("meta")}, ValueError, r"query must be on cpu like the other tensors, got meta"),
        ({"query": torch.zeros(3, 4, 6, 3)}, ValueError, r"number of rows must be a positive multiple of B=3, got 2"),
        ({"query": torch.zeros(1, 3, 6, 3)}, ValueError, r"query heads must be a positive multiple of G=2, got 3"),
        ({"query": torch.zeros(2, 0, 6, 3)}, ValueError, r"query heads must be a positive multiple of G=1, got 0"),
        ({"rows": INT[:0]}, ValueError, r"number of rows must be a positive multiple of B=2, got 0"),
        ({"keys": torch.zeros(5, 3)}, ValueError, r"keys must have shape \(R, slots, D\), got \(5, 3\)"),
        ({"keys": torch.zeros(()).expand(2, 2**30 + 1, 3)}, ValueError, r"keys must have at most 1073741824 slots"),
        ({"keys": KEYS.int()}, TypeError, r"keys must be floating point, got torch.int32"),
        ({"rows": INT.int()}, TypeError, r"rows must be torch.int64, got torch.int32"),
        ({"rows": INT + 2}, ValueError, r"rows must be in \[0, 1\], got \[2, 2\]"),
        ({"start": INT[:1]}, ValueError, r"start must have shape \(R\) with R=2, got \(1,\)"),
        ({"cursor": INT.double()}, TypeError, r"cursor must be torch.int64, got torch.float64"),
        ({"capacity": 0}, ValueError, r"capacity must be between 1 and the ring's 5 slots, got 0"),
        ({"capacity": 6}, ValueError, r"capacity must be between 1 and the ring's 5 slots, got 6"),
        ({"k": 0}, ValueError, r"k must be at least 1, got 0"),
        ({"k": 2.0}, TypeError, r"k must be an integer, got 2\.0"),
        ({"capacity": 4.0}, TypeError, r"capacity must be an integer, got 4\.0"),
        ({"start": INT - 1}, ValueError, r"start must be at least 0, got \[-1, -1\]"),
        ({"query": QUERY.tolist()}, TypeError, "query must be a torch.Tensor, got list"),
        ({"backend": "fast"}, ValueError, r"backend must be one of auto, .*got 'fast'"),
    ],
)
def test_bad_input_is_named_with_its_value_and_what_was_expected(
    changed: dict, error: type[Exception], message: str
) -> None:
    arguments = {
        "query": QUERY, "keys": KEYS, "rows": torch.tensor([0, 1]), "start": INT, "cursor": INT, "capacity": 4, "k": 2,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        knn_search(**{**arguments, **changed})


def test_a_row_may_have_as_many_slots_as_kernels_can_number() -> None:
    """On the meta device, where a tensor has no memory."""
    keys = torch.empty(2, 2**30, 3, device="meta")
    query, number = QUERY.to("meta"), INT.to("meta")
    scores, slots = knn_search(query, keys, number, number, number, capacity=2**30, k=2)
    assert scores.shape == slots.shape == (2, 4, 6, 2)
