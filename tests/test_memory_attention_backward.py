"""Gradients of `memory_attention`: those of the formula in float64, the same bits every time, none left unwritten."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import SHAPES, Shape, in_float64, random_attention
from checks import ATTENTION, assert_close
from devices import DEVICE, live_backends, seeded
from torch import Tensor

from memtrans_kernels import memory_attention

pytestmark = pytest.mark.device

DIFFERENTIABLE = ("query", "key", "value", "scale", "bias_table", "bias_dense", "memory_offset")
on_every_backend = pytest.mark.parametrize("backend", live_backends("memory_attention_backward"))
# Triton's interpreter truncates where it should round to bfloat16
DTYPES = [torch.float32, torch.float16] if DEVICE == "cpu" else list(ATTENTION)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """`torch.empty` gives NaN, so that a number that no kernel wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def gradients(inputs: dict[str, Any], grad_out: Tensor, grad_lse: Tensor, backend: str) -> dict[str, Tensor]:
    """Of out and lse together. Where a query attends to nothing lse is -inf: its gradient stays out."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in DIFFERENTIABLE if inputs[name] is not None}
    out, lse = memory_attention(**{**inputs, **leaves}, backend=backend)
    torch.autograd.backward((out, lse), (grad_out.to(out.dtype), grad_lse.to(lse.dtype)))
    return {name: leaf.grad for name, leaf in leaves.items()}


def upstream_gradients(shape: Shape) -> tuple[Tensor, Tensor]:
    """Of out, laid out as merging heads leaves it, and of lse."""
    out = torch.randn(shape.batch, shape.length, shape.heads, shape.width, generator=seeded(1)).transpose(1, 2)
    return out, torch.randn(shape.batch, shape.heads, shape.length, generator=seeded(2))


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_backend_equals_the_formula_in_float64(poisoned, backend, dtype, shape):
    inputs, (grad_out, grad_lse) = random_attention(shape, dtype, seeded(0)), upstream_gradients(shape)
    grad_out = grad_out.to(dtype)
    expected = gradients(in_float64(inputs), grad_out, grad_lse, "reference")
    for name, grad in gradients(inputs, grad_out, grad_lse, backend).items():
        assert grad.dtype == inputs[name].dtype
        assert_close(grad, expected[name], ATTENTION[dtype], name)


@on_every_backend
@pytest.mark.parametrize("shape", [SHAPES["dropout"], SHAPES["dense bias of every document"]], ids=["table", "dense"])
def test_two_passes_give_the_same_bits(backend, shape):
    inputs, upstream = random_attention(shape, torch.float16, seeded(0)), upstream_gradients(shape)
    first, second = (gradients(inputs, *upstream, backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@on_every_backend
def test_heads_that_share_keys_may_be_added_up_in_parts(backend):
    """The gradients of key and value of few keys come from several programs each."""
    shape = Shape(batch=1, heads=6, groups=2, length=20, local=25)
    inputs, upstream = random_attention(shape, torch.float32, seeded(0)), upstream_gradients(shape)
    expected = gradients(in_float64(inputs), *upstream, "reference")
    for name, grad in gradients(inputs, *upstream, backend).items():
        assert_close(grad, expected[name], ATTENTION[torch.float32], name)


@on_every_backend
def test_the_slot_that_minus_one_would_point_to_is_never_read(backend):
    shape = SHAPES["no local keys"]
    inputs, upstream = random_attention(shape, torch.float32, seeded(0)), upstream_gradients(shape)
    assert (inputs["slots"] == -1).any()
    rings = {name: inputs[name] for name in ("memory_keys", "memory_values")}
    longer = {name: torch.cat((ring, torch.full_like(ring[:, :1], torch.nan)), dim=1) for name, ring in rings.items()}
    before, after = gradients(inputs, *upstream, backend), gradients({**inputs, **longer}, *upstream, backend)
    assert all(torch.equal(before[name], after[name]) for name in before)


@on_every_backend
def test_the_layout_of_the_arguments_changes_nothing(backend):
    """One number for all heads, and numbers with gaps between them."""
    shape = SHAPES["table over two tiles, masked"]._replace(offset=True)
    inputs, upstream = random_attention(shape, torch.float32, seeded(0)), upstream_gradients(shape)
    inputs |= {name: torch.ones(shape.heads) for name in ("scale", "memory_offset")}
    spread = {name: torch.ones(1).expand(shape.heads) for name in ("scale", "memory_offset")}
    for name in ("local_length", "bias_table", "scores", "slots", "key", "memory_values"):
        spread[name] = torch.stack((inputs[name], inputs[name]), dim=-1)[..., 0]
    expected, actual = (gradients(given, *upstream, backend) for given in (inputs, {**inputs, **spread}))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
