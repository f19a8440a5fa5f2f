"""Number 1 of the clients' list: `gather_pairs` copies what a search found straight into the result."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import CAPACITY, ring
from helpers.devices import DEVICE, live_backends

from memtrans_kernels import gather_pairs

pytestmark = pytest.mark.device

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
on_every_backend = pytest.mark.parametrize("backend", live_backends("gather_pairs"))


def given(dtype=torch.float32, value_dtype=torch.float32, neighbours=6, length=5):
    torch.manual_seed(0)
    state = ring(dtype)
    slots = torch.randint(-1, CAPACITY, (2, 4, length, neighbours), dtype=torch.int32)
    return state["keys"], torch.randn(state["keys"].shape).to(value_dtype), state["rows"], slots


def in_a_loop(keys, values, rows, slots, dtype):
    pairs = torch.zeros(*slots.shape, 2, keys.shape[2], dtype=dtype)
    batch, heads = slots.shape[:2]
    groups = rows.numel() // batch
    for b, h, n, k in torch.cartesian_prod(*(torch.arange(size) for size in slots.shape)).tolist():
        row, slot = int(rows[b * groups + h // (heads // groups)]), int(slots[b, h, n, k])
        if slot >= 0:
            pairs[b, h, n, k, 0], pairs[b, h, n, k, 1] = keys[row, slot].to(dtype), values[row, slot].to(dtype)
    return pairs


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_22_1_every_backend_copies_bit_for_bit(backend, stored, dtype):
    keys, values, rows, slots = given(stored, DTYPES[DTYPES.index(stored) - 1])
    if backend == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16:
        # its interpreter truncates where GPUs round, so of numbers that need no rounding
        keys, values = keys.to(dtype).to(keys.dtype), values.to(dtype).to(values.dtype)
    pairs = gather_pairs(keys, values, rows, slots, dtype, backend=backend)
    assert pairs.dtype == dtype and pairs.is_contiguous()
    assert torch.equal(pairs, in_a_loop(keys, values, rows, slots, dtype))


@on_every_backend
@pytest.mark.parametrize(("length", "neighbours"), [(0, 3), (3, 0), (1, 1), (70, 33)])
def test_22_1_sizes_that_fill_no_block(backend, length, neighbours):
    keys, values, rows, slots = given(neighbours=neighbours, length=length)
    pairs = gather_pairs(keys, values, rows, slots, backend=backend)
    assert torch.equal(pairs, in_a_loop(keys, values, rows, slots, torch.float32))


@on_every_backend
def test_22_1_where_nothing_was_found_zeros_hide_what_the_ring_holds(backend):
    keys, values, rows, slots = given()
    keys, values = torch.full_like(keys, torch.nan), torch.full_like(values, torch.inf)
    assert not gather_pairs(keys, values, rows, torch.full_like(slots, -1), backend=backend).any()


@on_every_backend
def test_22_1_rings_rows_and_slots_of_any_strides(backend):
    keys, values, rows, slots = given()
    expected = in_a_loop(keys, values, rows, slots, torch.float32)
    of_any = rows.repeat_interleave(2)[::2], slots.transpose(1, 3).contiguous().transpose(1, 3)
    apart = torch.stack((keys, values), dim=-1).unbind(dim=-1)
    across = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (keys, values)]
    for rings in (apart, across):
        assert torch.equal(gather_pairs(*rings, *of_any, backend=backend), expected)


@on_every_backend
def test_22_1_rows_may_repeat(backend):
    keys, values, rows, slots = given()
    rows = rows[[1, 1, 1, 1]]
    pairs = gather_pairs(keys, values, rows, slots, backend=backend)
    assert torch.equal(pairs, in_a_loop(keys, values, rows, slots, torch.float32))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": torch.zeros(5, 17, 7)}, ValueError, r"values must have shape .* D=8, got"),
        ({"rows": torch.tensor([0, 1, 2])}, ValueError, "the number of rows must be a positive multiple of B=2, got 3"),
        pytest.param(
            {"rows": torch.tensor([0, 1, 2, 9])},
            ValueError,
            r"rows must be in \[0, 4\], got \[0, 1, 2, 9\]",
            marks=pytest.mark.cpu,
        ),
        ({"slots": torch.zeros(2, 4, 5, 1)}, TypeError, "slots must be torch.int32, got torch.float32"),
        pytest.param(
            {"slots": torch.full((2, 4, 5, 1), 17).int()},
            ValueError,
            r"slots must be in \[-1, 16\], got ",
            marks=pytest.mark.cpu,
        ),
        ({"dtype": torch.int64}, TypeError, "dtype must be one of torch.float32"),
        ({"backend": "faiss"}, RuntimeError, "faiss does not implement it"),
    ],
)
def test_22_1_what_does_not_fit_is_refused(change, error, message):
    keys, values, rows, slots = given()
    arguments = {"keys": keys, "values": values, "rows": rows, "slots": slots, **change}
    with pytest.raises(error, match=message):
        gather_pairs(**arguments)
