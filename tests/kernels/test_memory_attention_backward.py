"""Gradients of `memory_attention`: those of the formula in float64, the same bits every time, none left unwritten."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.cases import (
    BATCH,
    CAPACITY,
    GROUPS,
    SHAPES,
    SPARE,
    WIDTH,
    Shape,
    attention_gradients,
    attention_inputs,
    gradients_of_results,
    in_float64,
    random_attention,
)
from helpers.checks import ATTENTION, assert_close
from helpers.devices import DEVICE, live_backends, seeded, uninitialised_is_nan
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memtrans_kernels import knn_add_, memory_attention

pytestmark = pytest.mark.device

on_every_backend = pytest.mark.parametrize("backend", live_backends("memory_attention_backward"))
# Triton's interpreter truncates where it should round to bfloat16
DTYPES = [torch.float32, torch.float16] if DEVICE == "cpu" else list(ATTENTION)


@pytest.fixture
def poisoned() -> Iterator[None]:
    with uninitialised_is_nan():
        yield


def gradients(inputs: dict[str, Any], grad_out: Tensor, grad_lse: Tensor, backend: str) -> dict[str, Tensor]:
    return attention_gradients(inputs, grad_out, grad_lse, backend)[2]


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_backend_equals_the_formula_in_float64(poisoned, backend, dtype, shape):
    inputs, (grad_out, grad_lse) = random_attention(shape, dtype, seeded(0)), gradients_of_results(shape)
    grad_out = grad_out.to(dtype)
    expected = gradients(in_float64(inputs), grad_out, grad_lse, "reference")
    for name, grad in gradients(inputs, grad_out, grad_lse, backend).items():
        assert grad.dtype == inputs[name].dtype
        assert_close(grad, expected[name], ATTENTION[dtype], name)


@on_every_backend
@pytest.mark.parametrize("name", ["table inside one tile, groups", "tiles that line up"])
def test_without_gradients_of_keys_all_others_are_the_same_bits(backend, name):
    shape = SHAPES[name]._replace(batch=1)
    inputs, (grad_out, grad_lse) = random_attention(shape, torch.float32, seeded(0)), gradients_of_results(shape)
    expected = gradients(inputs, grad_out, grad_lse, backend)
    wanted = {name: inputs[name].detach().requires_grad_() for name in expected if name not in ("key", "value")}
    results = memory_attention(**{**inputs, **wanted}, backend=backend)
    torch.autograd.backward(results, (grad_out, grad_lse))
    for name, leaf in wanted.items():
        assert torch.equal(leaf.grad, expected[name]), name


class Watching(TorchDispatchMode):
    """Watches operators, which then check that what they return is no tensor twice."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@on_every_backend
def test_without_gradients_of_keys_they_may_be_watched(backend):
    shape = SHAPES["table inside one tile, groups"]._replace(batch=1)
    inputs, upstream = random_attention(shape, torch.float32, seeded(0)), gradients_of_results(shape)
    query = inputs["query"].detach().requires_grad_()
    with Watching():
        torch.autograd.backward(memory_attention(**{**inputs, "query": query}, backend=backend), upstream)
    assert_close(query.grad, gradients(inputs, *upstream, backend)["query"], ATTENTION[torch.float32], "query")


@on_every_backend
@pytest.mark.parametrize("shape", [SHAPES["dropout"], SHAPES["dense bias of every document"]], ids=["table", "dense"])
def test_two_passes_give_the_same_bits(backend, shape):
    inputs, upstream = random_attention(shape, torch.float16, seeded(0)), gradients_of_results(shape)
    first, second = (gradients(inputs, *upstream, backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["table", "tiles that line up", "dense", "retrieved", "local"])
def test_twenty_passes_give_the_same_bits(form):
    """At a size whose programs run side by side, in an order of their own each time."""
    shape = Shape(
        batch=4, heads=8, groups=2, length=500, local=700, width=64, neighbours=32, offset=True, dropout_p=0.1
    )
    change = {
        "table": {"distances": 129}, "tiles that line up": {"distances": 129, "length": 512, "local": 704},
        "dense": {"dense": 1}, "retrieved": {"local": 0}, "local": {"neighbours": 0},
    }  # fmt: skip
    shape = shape._replace(**change[form])
    inputs, of_results = random_attention(shape, torch.bfloat16, seeded(0)), gradients_of_results(shape)
    out, lse, grads = attention_gradients(inputs, *of_results, "triton")
    for _ in range(20):
        again_out, again_lse, again = attention_gradients(inputs, *of_results, "triton")
        assert torch.equal(out, again_out) and torch.equal(lse, again_lse)
        assert all(torch.equal(grads[name], again[name]) for name in grads)


@on_every_backend
def test_a_ring_that_wraps_between_forward_and_backward_changes_no_gradient(backend):
    """As many entries as there are spare slots; the ring is read through an alias, as `memtrans.memory` does it."""
    kept = []
    for added in (0, SPARE):
        torch.manual_seed(0)
        inputs = attention_inputs()
        rings = {name: inputs[name] for name in ("memory_keys", "memory_values")}
        aliases = {name: torch.from_dlpack(ring.detach()) for name, ring in rings.items()}
        out, lse = memory_attention(**{**inputs, **aliases}, backend=backend)
        before = rings["memory_values"].clone()
        new = torch.full((BATCH, GROUPS, added, WIDTH), 1e4)
        cursor = torch.full(before.shape[:1], 3 * SPARE)  # `attention_inputs` added six entries three times
        knn_add_(*rings.values(), cursor, inputs["rows"], new, new)
        changed = (rings["memory_values"] != before).any(dim=-1)
        assert changed[inputs["rows"]].sum(dim=1).tolist() == [added] * len(inputs["rows"])
        (out.square().sum() + lse.sum()).backward()
        kept.append({name: inputs[name].grad for name in ("query", "key", "value", "scale", "bias_table")})
    assert CAPACITY + SPARE < 4 * SPARE, "the added entries go round the ring's end"
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


@on_every_backend
def test_heads_that_share_keys_may_be_added_up_in_parts(backend):
    """The gradients of key and value of few keys come from several programs each."""
    shape = Shape(batch=1, heads=6, groups=2, length=20, local=25)
    inputs, upstream = random_attention(shape, torch.float32, seeded(0)), gradients_of_results(shape)
    expected = gradients(in_float64(inputs), *upstream, "reference")
    for name, grad in gradients(inputs, *upstream, backend).items():
        assert_close(grad, expected[name], ATTENTION[torch.float32], name)


@on_every_backend
def test_the_slot_that_minus_one_would_point_to_is_never_read(backend):
    shape = SHAPES["no local keys"]
    inputs, upstream = random_attention(shape, torch.float32, seeded(0)), gradients_of_results(shape)
    assert (inputs["slots"] == -1).any()
    rings = {name: inputs[name] for name in ("memory_keys", "memory_values")}
    longer = {name: torch.cat((ring, torch.full_like(ring[:, :1], torch.nan)), dim=1) for name, ring in rings.items()}
    before, after = gradients(inputs, *upstream, backend), gradients({**inputs, **longer}, *upstream, backend)
    assert all(torch.equal(before[name], after[name]) for name in before)


@on_every_backend
def test_the_layout_of_the_arguments_changes_nothing(backend):
    """One number for all heads, and numbers with gaps between them."""
    shape = SHAPES["table over two tiles, masked"]._replace(offset=True, batch=1, width=16)
    inputs, upstream = random_attention(shape, torch.float32, seeded(0)), gradients_of_results(shape)
    inputs |= {name: torch.ones(shape.heads) for name in ("scale", "memory_offset")}
    spread = {name: torch.ones(1).expand(shape.heads) for name in ("scale", "memory_offset")}
    for name in ("local_length", "bias_table", "scores", "slots", "key", "memory_values"):
        spread[name] = torch.stack((inputs[name], inputs[name]), dim=-1)[..., 0]
    expected, actual = (gradients(given, *upstream, backend) for given in (inputs, {**inputs, **spread}))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
