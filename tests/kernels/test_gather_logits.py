"""`gather_logits` gives the inner products of queries and the keys in their slots, with a gradient for the query."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import CAPACITY, ring
from helpers.checks import ATTENTION, assert_close
from helpers.devices import default_dtype, live_backends

from memtrans_kernels import gather_logits, knn_search

pytestmark = pytest.mark.device

on_every_backend = pytest.mark.parametrize("backend", live_backends("gather_logits"))


def given(dtype=torch.float32, neighbours=6, length=19):
    """A query laid out as heads are split, and slots of which some are missing."""
    torch.manual_seed(0)
    state = ring(dtype)
    query = torch.randn(2, length, 4, 8, dtype=dtype).transpose(1, 2).requires_grad_()
    slots = torch.randint(-1, CAPACITY, (2, 4, length, neighbours), dtype=torch.int32)
    return query, state["keys"], state["rows"], slots


def in_a_loop(query, keys, rows, slots):
    """(B, H, N, K) in float64, -inf where there is none."""
    of_heads = rows.reshape(2, 2).repeat_interleave(2, dim=1)
    every = torch.einsum("bhnd,bhsd->bhns", query.double(), keys.double()[of_heads])
    return every.gather(-1, slots.long().clamp(min=0)).masked_fill(slots < 0, -torch.inf)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("neighbours", [0, 1, 6])
def test_22_7_every_backend_equals_the_formula_in_float64(backend, dtype, neighbours):
    query, keys, rows, slots = given(dtype, neighbours)
    logits = gather_logits(query, keys, rows, slots, backend=backend)
    wide = query.detach().double().requires_grad_()
    expected = in_a_loop(wide, keys, rows, slots)
    assert logits.dtype == torch.float32 and torch.equal(logits == -torch.inf, slots < 0)
    assert_close(logits.masked_fill(slots < 0, 0.0), expected.masked_fill(slots < 0, 0.0), ATTENTION[torch.float32])
    upstream = torch.randn(expected.shape).masked_fill(slots < 0, torch.nan)  # nobody reads those
    logits.backward(upstream)
    (grad,) = torch.autograd.grad(expected, wide, upstream.double().masked_fill(slots < 0, 0.0))
    assert_close(query.grad, grad, ATTENTION[dtype], "gradient")


@on_every_backend
def test_22_7_they_are_the_scores_of_the_search(backend):
    state = ring()
    query = torch.randn(2, 4, 5, 8)
    scores, slots = knn_search(query, state["keys"], state["rows"], state["start"], state["cursor"], CAPACITY, 20)
    logits = gather_logits(query, state["keys"], state["rows"], slots, backend=backend)
    assert torch.equal(logits == -torch.inf, scores == -torch.inf)
    torch.testing.assert_close(logits, scores)


@on_every_backend
def test_21_16_logits_are_float32_whatever_the_default_is(backend):
    arguments = given()
    expected = gather_logits(*arguments, backend=backend)
    with default_dtype(torch.bfloat16):
        logits = gather_logits(*arguments, backend=backend)
    assert logits.dtype == torch.float32 and torch.equal(logits, expected)


def test_22_7_gradcheck_and_in_blocks(monkeypatch):
    query, keys, rows, slots = given(torch.float64, length=5)
    slots = slots.clamp(min=0)
    whole = gather_logits(query, keys, rows, slots)
    assert torch.autograd.gradcheck(lambda query: gather_logits(query, keys, rows, slots), (query,))
    of_reference = {"rows": rows, "slots": slots, "backend": "reference"}
    assert torch.autograd.gradgradcheck(lambda query: gather_logits(query.sin(), keys, **of_reference), (query,))
    monkeypatch.setattr("memtrans_kernels.impl.reference.gather_logits.GATHERED_BYTES", 1)
    assert torch.equal(gather_logits(query, keys, rows, slots), whole)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(2, 4, 5, 7)}, ValueError, r"keys must have shape .* D=7, got"),
        ({"rows": torch.tensor([0, 1, 2])}, ValueError, "the number of rows must be a positive multiple of B=2, got 3"),
        ({"rows": torch.tensor([0, 1, 2, 9])}, ValueError, r"rows must be in \[0, 4\], got \[0, 1, 2, 9\]"),
        ({"slots": torch.zeros(2, 4, 5, 1)}, TypeError, "slots must be torch.int32, got torch.float32"),
        ({"slots": torch.full((2, 4, 5, 1), 17).int()}, ValueError, r"slots must be in \[-1, 16\], got "),
        ({"backend": "native"}, RuntimeError, "native does not implement it"),
    ],
)
@pytest.mark.cpu
def test_22_7_errors_name_argument_value_and_expectation(change, error, message):
    names = ("query", "keys", "rows", "slots")
    with pytest.raises(error, match=message):
        gather_logits(**{**dict(zip(names, given(length=5), strict=True)), **change})
