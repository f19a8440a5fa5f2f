"""The ring write: entry i of a row goes to slot i mod (M + S), cast and saturated, and the cursor moves on."""

from __future__ import annotations

import itertools
import os
from typing import NamedTuple

import pytest
import torch
from helpers.devices import live_backends, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtrans_kernels import knn_add_
from memtrans_kernels.backends import resolve

pytestmark = pytest.mark.device

BACKENDS = live_backends("knn_add_")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Triton refuses float64, and its interpreter truncates to bfloat16 where GPUs round (1.005 becomes 1.0): seen with 3.9.
INTERPRETED_DTYPES = (torch.float32, torch.float16)
EXAMPLES = 15 if os.environ.get("TRITON_INTERPRET") == "1" else 100  # an interpreted write takes 0.1 s
NAN, INF = float("nan"), float("inf")

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


class Rings(NamedTuple):
    """Two rings of R rows and M + S slots, and how many entries each row was ever given."""

    keys: Tensor
    values: Tensor
    cursor: Tensor

    def clone(self) -> Rings:
        return Rings(*(tensor.clone() for tensor in self))


def rings(
    rows: int = 3,
    slots: int = 4,
    width: int = 2,
    *,
    filled: float = 0.0,
    dtype: torch.dtype = torch.float32,
    value_dtype: torch.dtype | None = None,
) -> Rings:
    keys = torch.full((rows, slots, width), filled, dtype=dtype)
    values = torch.full((rows, slots, width), filled, dtype=value_dtype or dtype)
    return Rings(keys, values, torch.zeros(rows, dtype=torch.int64))


def numbered(batch: int, groups: int, length: int, width: int = 2, *, first: int = 1) -> Tensor:
    """Entries (B, G, N, D) of different numbers, so that a misplaced one shows."""
    count = batch * groups * length * width
    return torch.arange(float(first), first + count).reshape(batch, groups, length, width)


def assert_same_bits(actual: Rings, expected: Rings) -> None:
    for tensor, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=0, equal_nan=True)


def stored(number: float, dtype: torch.dtype, *, is_key: bool) -> float:
    """What a ring of `dtype` holds for a number: the nearest one, or the largest where that would be infinite."""
    largest = torch.finfo(dtype).max
    if number != number or (is_key and number in (INF, -INF)):
        return number
    return float(torch.tensor(max(-largest, min(largest, number)), dtype=torch.float64).to(dtype))


def write_entry_by_entry(
    ring: Rings,
    rows: list[int],
    new_keys: Tensor,
    new_values: Tensor,
    count: list[int],
    at: list[int],
    first: list[int],
) -> Rings:
    """The definition, one number at a time."""
    keys, values, cursor = ring.keys.tolist(), ring.values.tolist(), ring.cursor.tolist()
    flat_keys, flat_values = new_keys.flatten(0, 1).tolist(), new_values.flatten(0, 1).tolist()
    slots = ring.keys.shape[1]
    for index, row in enumerate(rows):
        for j in range(first[index], count[index]):
            entry = at[row] + j - first[index]
            if entry < cursor[row]:
                continue  # stored already
            slot = entry % slots
            keys[row][slot] = [stored(x, ring.keys.dtype, is_key=True) for x in flat_keys[index][j]]
            values[row][slot] = [stored(x, ring.values.dtype, is_key=False) for x in flat_values[index][j]]
        cursor[row] = max(cursor[row], at[row] + max(0, count[index] - first[index]))
    return Rings(
        torch.tensor(keys, dtype=torch.float64).to(ring.keys.dtype),
        torch.tensor(values, dtype=torch.float64).to(ring.values.dtype),
        torch.tensor(cursor),
    )


SPECIAL = (0.0, -0.0, 65504.0, 65519.0, 65520.0, 1e-8, 1e-40, 3.4e38, -3.4e38, 1e39, INF, -INF, NAN)


def draw_entries(data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Ordinary numbers with some of every dtype's extremes among them."""
    generator = seeded(data.draw(st.integers(0, 2**32), "seed"))
    ordinary = torch.randn(shape, generator=generator, dtype=torch.float64)
    special = torch.tensor(SPECIAL, dtype=torch.float64)[torch.randint(len(SPECIAL), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.2, special, ordinary).to(dtype)


@on_every_backend
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_writes_equal_the_definition(backend: str, data: st.DataObject) -> None:
    """Rows picked and permuted, several groups, counts, snapshots that lag behind, N beyond the ring, every dtype."""
    dtype = st.sampled_from(INTERPRETED_DTYPES if backend == "triton" else DTYPES)
    ring_rows, width = data.draw(st.integers(1, 6), "R"), data.draw(st.integers(1, 3), "D")
    value_width = data.draw(st.integers(1, 3), "E")
    slots = data.draw(st.integers(1, 7), "M + S")
    ring = Rings(
        draw_entries(data, (ring_rows, slots, width), data.draw(dtype, "keys")),
        draw_entries(data, (ring_rows, slots, value_width), data.draw(dtype, "values")),
        torch.tensor(data.draw(st.lists(st.integers(0, 20), min_size=ring_rows, max_size=ring_rows), "cursor")),
    )
    for _ in range(data.draw(st.integers(1, 3), "steps")):
        rows = data.draw(st.permutations(range(ring_rows)), "rows")[: data.draw(st.integers(1, ring_rows), "B·G")]
        groups = data.draw(st.sampled_from([g for g in range(1, len(rows) + 1) if len(rows) % g == 0]), "G")
        length = data.draw(st.integers(0, 2 * slots + 1), "N")
        shape = (len(rows) // groups, groups, length, width)
        new_keys = draw_entries(data, shape, data.draw(dtype, "new_keys"))
        new_values = draw_entries(data, (*shape[:3], value_width), data.draw(dtype, "new_values"))
        counts = st.lists(st.integers(0, length), min_size=len(rows), max_size=len(rows))
        count, first = data.draw(st.none() | counts, "count"), data.draw(st.none() | counts, "first")
        cursor = ring.cursor.tolist()
        at = data.draw(st.none() | st.tuples(*(st.integers(max(0, end - 5), end) for end in cursor)), "at")
        expected = write_entry_by_entry(
            ring, rows, new_keys, new_values, [length] * len(rows) if count is None else count, list(at or cursor),
            [0] * len(rows) if first is None else first,
        )  # fmt: skip
        knn_add_(
            *ring,
            torch.tensor(rows),
            new_keys,
            new_values,
            None if count is None else torch.tensor(count, dtype=torch.int64),
            at=None if at is None else torch.tensor(at),
            first=None if first is None else torch.tensor(first, dtype=torch.int64),
            backend=backend,
        )
        assert_same_bits(ring, expected)


@on_every_backend
def test_an_entry_goes_to_its_number_modulo_the_ring(backend: str) -> None:
    ring = rings(rows=1, slots=3, width=1)
    for first in (1, 3):
        new = numbered(1, 1, 2, 1, first=first)
        knn_add_(*ring, torch.tensor([0]), new, -new, backend=backend)
    assert ring.keys.flatten().tolist() == [4.0, 2.0, 3.0]
    assert ring.values.flatten().tolist() == [-4.0, -2.0, -3.0]
    assert ring.cursor.tolist() == [4]


@on_every_backend
@pytest.mark.parametrize("slots", [1, 3, 4])
def test_of_a_segment_longer_than_the_ring_the_newest_entries_stay(backend: str, slots: int) -> None:
    ring = rings(rows=1, slots=slots, width=1)
    new = numbered(1, 1, 8, 1)  # the numbers 1 to 8 are the entries 0 to 7
    knn_add_(*ring, torch.tensor([0]), new, new, backend=backend)
    assert ring.cursor.tolist() == [8]
    assert {ring.keys[0, (number - 1) % slots, 0].item() for number in range(8 - slots + 1, 9)} == set(
        range(8 - slots + 1, 9)
    )


@on_every_backend
def test_rows_that_are_not_picked_keep_their_bits(backend: str) -> None:
    ring = rings(rows=5, filled=NAN)
    new = numbered(2, 1, 3)
    knn_add_(*ring, torch.tensor([3, 1]), new, new, backend=backend)
    assert ring.cursor.tolist() == [0, 3, 0, 3, 0]
    assert torch.equal(ring.keys[3, :3], new[0, 0])
    assert torch.equal(ring.keys[1, :3], new[1, 0])
    assert ring.keys[[0, 2, 4]].isnan().all()
    assert ring.keys[:, 3].isnan().all()


@on_every_backend
def test_a_document_has_one_row_per_group(backend: str) -> None:
    ring = rings(rows=4, slots=2, width=1)
    new = numbered(2, 2, 1, 1)  # (B, G, N, D)
    knn_add_(*ring, torch.tensor([0, 1, 2, 3]), new, new, backend=backend)
    assert ring.keys[:, 0, 0].tolist() == [1.0, 2.0, 3.0, 4.0]


@on_every_backend
def test_count_leaves_a_padded_tail_out(backend: str) -> None:
    ring = rings(rows=3, slots=4, width=1, filled=-1.0)
    new = numbered(3, 1, 3, 1)
    knn_add_(*ring, torch.tensor([0, 1, 2]), new, new, torch.tensor([0, 2, 3]), backend=backend)
    assert ring.keys[..., 0].tolist() == [[-1, -1, -1, -1], [4, 5, -1, -1], [7, 8, 9, -1]]
    assert ring.cursor.tolist() == [0, 2, 3]


@on_every_backend
def test_first_leaves_a_padded_beginning_out(backend: str) -> None:
    ring = rings(rows=3, slots=4, width=1, filled=-1.0)
    new, count, first = numbered(3, 1, 3, 1), torch.tensor([3, 2, 1]), torch.tensor([2, 1, 1])
    knn_add_(*ring, torch.tensor([0, 1, 2]), new, new, count, first=first, backend=backend)
    assert ring.keys[..., 0].tolist() == [[3, -1, -1, -1], [5, -1, -1, -1], [-1, -1, -1, -1]]
    assert ring.cursor.tolist() == [1, 1, 0]


@on_every_backend
@pytest.mark.parametrize("length", [0, 1, 2])
def test_entries_between_the_cursor_and_a_later_place_are_counted_as_they_lie(backend: str, length: int) -> None:
    ring = rings(rows=2, slots=8, width=1, filled=7.0)
    new = numbered(1, 1, length, 1)
    knn_add_(*ring, torch.tensor([1]), new, new, at=torch.tensor([3, 5]), backend=backend)
    assert ring.cursor.tolist() == [0, 5 + length]
    assert ring.keys[1, :, 0].tolist() == [7.0] * 5 + [1.0, 2.0][:length] + [7.0] * (3 - length)


@on_every_backend
def test_nothing_is_written_where_no_row_is_picked(backend: str) -> None:
    ring, nothing = rings(rows=2), torch.zeros(0, 1, 3, 2)
    knn_add_(*ring, torch.zeros(0, dtype=torch.int64), nothing, nothing, at=torch.tensor([3, 5]), backend=backend)
    assert_same_bits(ring, rings(rows=2))


@on_every_backend
@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 11])
def test_writing_twice_from_a_snapshot_changes_nothing(backend: str, length: int) -> None:
    ring = rings(slots=4)
    knn_add_(*ring, torch.tensor([0, 1, 2]), numbered(3, 1, 3), numbered(3, 1, 3), backend=backend)
    snapshot, new = ring.cursor.clone(), numbered(3, 1, length, first=100)
    knn_add_(*ring, torch.tensor([0, 1, 2]), new, new, at=snapshot, backend=backend)
    once = ring.clone()
    knn_add_(*ring, torch.tensor([0, 1, 2]), new + 1000, new + 1000, at=snapshot, backend=backend)
    assert_same_bits(ring, once)


@on_every_backend
@pytest.mark.parametrize(("dtype", "largest"), [(torch.float16, 65504.0), (torch.bfloat16, 3.3895313892515355e38)])
def test_numbers_beyond_the_dtype_saturate(backend: str, dtype: torch.dtype, largest: float) -> None:
    ring = rings(rows=1, slots=2, width=2, dtype=dtype)
    new = torch.tensor([[[[3.4e38, -3.4e38], [largest, -0.0]]]])  # nearly the largest float32
    knn_add_(*ring, torch.tensor([0]), new, new, backend=backend)
    for tensor in (ring.keys, ring.values):
        assert tensor.tolist() == [[[largest, -largest], [largest, 0.0]]]
        assert tensor[0, 1, 1].signbit()


@pytest.mark.parametrize(
    ("backend", "dtype", "given_dtype"),
    [
        (backend, dtype, given_dtype)
        for backend in BACKENDS
        for dtype, given_dtype in itertools.product(INTERPRETED_DTYPES if backend == "triton" else DTYPES, repeat=2)
    ],
)
def test_an_infinite_key_stays_infinite_and_an_infinite_value_never_does(
    backend: str, dtype: torch.dtype, given_dtype: torch.dtype
) -> None:
    """So the key is never retrieved, and a weight of 0 times the value is never NaN."""
    ring = rings(rows=1, slots=1, width=3, dtype=dtype)
    new = torch.tensor([[[[INF, -INF, NAN]]]], dtype=given_dtype)
    knn_add_(*ring, torch.tensor([0]), new, new, backend=backend)
    largest = torch.finfo(dtype).max
    assert ring.keys[0, 0, :2].tolist() == [INF, -INF]
    assert ring.values[0, 0, :2].tolist() == [largest, -largest]
    assert ring.keys[0, 0, 2].isnan()
    assert ring.values[0, 0, 2].isnan()


@on_every_backend
def test_entries_need_not_be_contiguous(backend: str) -> None:
    ring, expected = rings(rows=2), rings(rows=2)
    pairs = torch.randn(2, 3, 2, 2, generator=seeded(0))  # (B, N, 2, D), as a memory gets them
    new_keys, new_values = pairs[:, None, :, 0], pairs[:, None, :, 1]
    knn_add_(*ring, torch.tensor([1, 0]), new_keys, new_values, backend=backend)
    knn_add_(*expected, torch.tensor([1, 0]), new_keys.contiguous(), new_values.contiguous(), backend=backend)
    assert_same_bits(ring, expected)


def apart(tensor: Tensor) -> Tensor:
    """The same numbers, each one twice in memory: without the stride they would be taken for others."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


@on_every_backend
@pytest.mark.parametrize("name", ["rows", "count", "at"])
def test_what_is_only_read_need_not_be_contiguous(backend: str, name: str) -> None:
    ring, new = rings(rows=3, slots=4, width=1), numbered(2, 1, 2, 1)
    arguments = {"rows": torch.tensor([2, 0]), "count": torch.tensor([2, 1]), "at": torch.tensor([1, 0, 3])}
    arguments[name] = apart(arguments[name])
    knn_add_(*ring, new_keys=new, new_values=new, **arguments, backend=backend)
    assert ring.keys[..., 0].tolist() == [[0, 3, 0, 0], [0, 0, 0, 0], [2, 0, 0, 1]]
    assert ring.cursor.tolist() == [2, 0, 5]


def strided(ring: Rings, which: str) -> Rings:
    """The same rings with keys and values side by side in each slot, or with one part's numbers apart."""
    if which == "keys and values":
        pairs = torch.stack((ring.keys, ring.values), dim=2)  # (R, M + S, 2, D)
        return Rings(pairs[:, :, 0], pairs[:, :, 1], ring.cursor)
    return ring._replace(**{which: apart(getattr(ring, which))})


PLACES = ("keys and values", "keys", "values", "cursor")
REFUSED = {"triton": PLACES, "native": ("keys", "values")}  # a native write takes strides, but of the last axis


@pytest.mark.parametrize("which", PLACES)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_a_ring_that_is_not_contiguous_is_written_rightly_or_not_at_all(backend: str, which: str) -> None:
    """`auto` finds a backend that can; a named one that cannot says why."""
    ring, expected = strided(rings(rows=3), which), rings(rows=3)
    arguments = (torch.tensor([2, 0]), numbered(2, 1, 3), -numbered(2, 1, 3))
    if which in REFUSED.get(backend, ()):
        with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot run knn_add_ on .* must be contiguous"):
            knn_add_(*ring, *arguments, backend=backend)
    else:
        knn_add_(*ring, *arguments, backend=backend)
        knn_add_(*expected, *arguments, backend="reference")
    assert_same_bits(ring, expected)


@on_every_backend
def test_the_memory_is_never_differentiated(backend: str) -> None:
    ring = rings(rows=1)
    new = numbered(1, 1, 2).requires_grad_()
    knn_add_(*ring, torch.tensor([0]), new, new, backend=backend)
    assert not ring.keys.requires_grad
    assert not ring.values.requires_grad


@on_every_backend
@pytest.mark.parametrize("argument", ["at", "cursor", "count", "rows"])
@pytest.mark.parametrize("number", [-(2**63), -1, 2**62 + 1, 2**63 - 1])
def test_21_1_no_number_however_large_leads_outside_the_ring(backend: str, argument: str, number: int) -> None:
    """An implementation alone, as on a GPU, where nobody looks: the row stays as it is, the next is written."""
    if argument == "rows" and backend == "reference":
        pytest.skip("PyTorch's own indexing refuses it")
    around = torch.full((2, 9, 4, 2), 7.0)  # rows 3 to 5 are the ring
    ring = Rings(*around[:, 3:6], torch.tensor([6, 6, 6]))
    arguments = {"rows": torch.tensor([0, 2]), "count": torch.tensor([2, 2]), "at": ring.cursor.clone()}
    {**arguments, "cursor": ring.cursor}[argument][0] = number
    expected = ring.clone()._replace(cursor=torch.tensor([6, 6, 6]))
    given = (*ring, arguments["rows"], NEW[:2] + 1, NEW[:2] + 1, arguments["count"], arguments["at"])
    write = resolve("knn_add_", backend, *given)
    if backend == "native":
        with pytest.raises(RuntimeError, match=f"{argument} must .*, got {number}"):
            write(*given)
    else:
        write(*given)
        knn_add_(*expected, torch.tensor([2]), NEW[:1] + 1, NEW[:1] + 1)
    expected.cursor[0] = number if argument == "cursor" else 6
    assert_same_bits(ring, expected)
    assert (around[:, [0, 1, 2, 6, 7, 8]] == 7.0).all()


NOT_WRITABLE = {
    "keys that need a gradient": ("keys", lambda ring: ring.keys.clone().requires_grad_()),
    "values that need a gradient": ("values", lambda ring: ring.values.clone().requires_grad_()),
    "keys that need one by what made them": ("keys", lambda ring: ring.keys * torch.ones(1, requires_grad=True)),
    "rows that share their slots": ("keys", lambda ring: ring.keys[:1].expand(3, 4, 2)),
    "slots that share their place": ("values", lambda ring: ring.values[:, :1].expand(3, 4, 2)),
    "windows that overlap": ("values", lambda ring: torch.zeros(20).as_strided((3, 4, 2), (4, 2, 1))),
    "a cursor for all rows": ("cursor", lambda ring: ring.cursor[:1].expand(3)),
}


@on_every_backend
@pytest.mark.parametrize("case", NOT_WRITABLE)
def test_21_1_the_operator_itself_writes_to_no_ring_that_is_not_its_own_numbers(backend: str, case: str) -> None:
    name, make = NOT_WRITABLE[case]
    ring = rings()
    refused = make(ring)
    given, before = ring._replace(**{name: refused}), refused.detach().clone()
    with pytest.raises(ValueError, match=f"{name} must (not require a gradient|have a place in memory)"):
        torch.ops.memtrans.knn_add_(*given, ROWS, NEW + 1, NEW + 1, None, None, None, backend)
    assert torch.equal(refused, before)
    assert not any(tensor.any() for tensor in ring)


@on_every_backend
def test_the_highest_entry_number_is_written_where_it_belongs(backend: str) -> None:
    ring, at = rings(rows=1), torch.tensor([2**62])
    knn_add_(*ring, torch.tensor([0]), numbered(1, 1, 3), numbered(1, 1, 3), at=at, backend=backend)
    assert ring.keys[0, :, 0].tolist() == [1.0, 3.0, 5.0, 0.0]  # 2^62 mod 4 is 0
    assert ring.cursor.tolist() == [2**62 + 3]


ROWS, NEW = torch.tensor([0, 1, 2]), torch.zeros(3, 1, 2, 2)
INT = torch.zeros(3, dtype=torch.int64)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"keys": torch.zeros(4, 2)}, ValueError, r"keys must have shape \(R, slots, D\), got \(4, 2\)"),
        (
            {"keys": torch.zeros(()).expand(3, 2**30 + 1, 2)},
            ValueError,
            r"keys .* at most 1073741824 slots .*, got 1073741825",
        ),
        ({"values": torch.zeros(3, 4, 3)}, ValueError, r"new_values must have shape .* E=3, got \(3, 1, 2, 2\)"),
        ({"values": torch.zeros(3, 5, 2)}, ValueError, r"values must have shape .* slots=4, got \(3, 5, 2\)"),
        ({"cursor": INT[:2]}, ValueError, r"cursor must have shape \(R\) with R=3, got \(2,\)"),
        ({"cursor": INT.int()}, TypeError, r"cursor must be torch.int64, got torch.int32"),
        ({"rows": INT.double()}, TypeError, r"rows must be torch.int64, got torch.float64"),
        ({"rows": INT[:2]}, ValueError, r"new_keys must have B·G=2 rows as `rows` has, got \(3, 1, 2, 2\)"),
        ({"new_keys": torch.zeros(3, 1, 2, 5)}, ValueError, r"new_keys must have shape .* D=2, got \(3, 1, 2, 5\)"),
        ({"new_values": torch.zeros(3, 1, 1, 2)}, ValueError, r"new_values must have .* N=2, .*got \(3, 1, 1, 2\)"),
        ({"new_keys": NEW.long()}, TypeError, r"new_keys must be floating point, got torch.int64"),
        ({"keys": torch.zeros(3, 4, 2).int()}, TypeError, r"keys must be floating point, got torch.int32"),
        ({"new_values": NEW.to("meta")}, ValueError, r"new_values must be on cpu like the other tensors, got meta"),
        ({"count": INT[:1]}, ValueError, r"count must have shape \(B·G\) with B·G=3, got \(1,\)"),
        ({"count": INT.float()}, TypeError, r"count must be torch.int64, got torch.float32"),
        ({"count": torch.tensor([0, 3, 1])}, ValueError, r"count must be in \[0, 2\], got \[0, 3, 1\]"),
        ({"count": torch.tensor([-1, 0, 1])}, ValueError, r"count must be in \[0, 2\], got \[-1, 0, 1\]"),
        ({"first": INT[:1]}, ValueError, r"first must have shape \(B·G\) with B·G=3, got \(1,\)"),
        ({"first": torch.tensor([0, 3, 1])}, ValueError, r"first must be in \[0, 2\], got \[0, 3, 1\]"),
        ({"at": INT[:1]}, ValueError, r"at must have shape \(R\) with R=3, got \(1,\)"),
        ({"at": INT.int()}, TypeError, r"at must be torch.int64, got torch.int32"),
        ({"rows": torch.tensor([0, 1, 3])}, ValueError, r"rows must be in \[0, 2\], got \[0, 1, 3\]"),
        ({"rows": torch.tensor([0, 1, -1])}, ValueError, r"rows must be in \[0, 2\], got \[0, 1, -1\]"),
        ({"rows": torch.tensor([0, 1, 0])}, ValueError, r"rows must be different numbers, got \[0, 1, 0\]"),
        ({"cursor": INT - 1}, ValueError, r"cursor must be at least 0, got \[-1, -1, -1\]"),
        ({"at": INT - 1}, ValueError, r"at must be at least 0, got \[-1, -1, -1\]"),
        ({"cursor": INT + 2**62 + 1}, ValueError, r"cursor must be at most 2\^62 = 4611686018427387904, got 461.*905"),
        (
            {"at": torch.tensor([0, 0, 2**63 - 1])},
            ValueError,
            r"at must be at most 2\^62 = .*, got 9223372036854775807",
        ),
        ({"keys": torch.zeros(3, 4, 2, requires_grad=True)}, ValueError, "keys must not require a gradient"),
        (
            {"values": torch.zeros(3, 1, 2).expand(3, 4, 2)},
            ValueError,
            r"values must have a place .* strides \(2, 0, 1\)",
        ),
        ({"keys": torch.zeros(20).as_strided((3, 4, 2), (4, 2, 1))}, ValueError, "keys must have a place in memory"),
        ({"cursor": INT[:1].expand(3)}, ValueError, "cursor must have a place in memory for each of its numbers"),
        ({"keys": torch.zeros(3, 4, 2).tolist()}, TypeError, "keys must be a torch.Tensor, got list"),
        ({"backend": "cuda"}, ValueError, r"backend must be one of auto, .*got 'cuda'"),
        (
            {"backend": "faiss"},
            RuntimeError,
            r"backend='faiss' cannot run knn_add_ on cpu: faiss does not implement it",
        ),
    ],
)
def test_bad_input_is_named_with_its_value_and_what_was_expected(
    changed: dict, error: type[Exception], message: str
) -> None:
    ring = rings()
    arguments = {**ring._asdict(), "rows": ROWS, "new_keys": NEW, "new_values": NEW, **changed}
    before = ring.clone()
    with pytest.raises(error, match=message):
        knn_add_(**arguments)
    assert_same_bits(ring, before)
