"""`memory_attention` over drawn shapes: the formula in float64, forward and every gradient; what must change nothing.

The parts that a gate mixes are drawn too: neighbours without local keys, local keys without neighbours.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.cases import Shape, attention_gradients, gradients_of_results, in_float64, random_attention
from helpers.checks import ATTENTION, LSE, assert_as_close_as, assert_close
from helpers.devices import DEVICE, live_backends, seeded, uninitialised_is_nan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtrans_kernels import memory_attention

pytestmark = pytest.mark.device

on_every_backend = pytest.mark.parametrize("backend", live_backends("memory_attention_backward"))
# Triton's interpreter truncates where it should round to bfloat16
DTYPES = [torch.float32, torch.float16] if DEVICE == "cpu" else list(ATTENTION)
# Interpreted, an example takes a second; on a GPU kernels are compiled for most of them
EXAMPLES = 6 if os.environ.get("TRITON_INTERPRET") == "1" else 40 if DEVICE == "cpu" else 20
drawn = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True, scope="module")
def poisoned() -> Iterator[None]:
    with uninitialised_is_nan():
        yield


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Up to two tiles of queries and three of keys; every length may be 0."""
    groups, heads_of_group = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2), (3, 1)]))
    parts = draw(st.sampled_from(["both", "both", "retrieved", "local"]))
    length = draw(st.sampled_from([0, 1, 1, 2, 15, 16, 17, 33, 64, 67]))
    cached = draw(st.sampled_from([0, 0, 1, 30, 65]))
    local = 0 if parts == "retrieved" else length + cached
    batch = draw(st.sampled_from([1, 2, 3]))
    bias = draw(st.sampled_from(["none", "table", "table", "dense", "both"]))
    return Shape(
        batch=batch,
        heads=groups * heads_of_group,
        groups=groups,
        length=length,
        local=local,
        width=draw(st.sampled_from([32, 64, 96, 128, 1, 24])),
        neighbours=0 if parts == "local" else draw(st.sampled_from([0, 1, 5, 32, 33])),
        distances=draw(st.sampled_from([1, 2, 16, 31, 129])) if bias in ("table", "both") else 0,
        dense=draw(st.sampled_from([1, batch])) if bias in ("dense", "both") else 0,
        offset=draw(st.booleans()),
        local_length=draw(st.booleans()),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.25])),
        key_mask=draw(st.booleans()),
        first=draw(st.booleans()),
        soft_cap=draw(st.sampled_from([None, None, 2.0, 50.0])),
        sink=draw(st.booleans()),
        value_width=draw(st.sampled_from([0, 0, 16, 80])),
    )


def either_way(shape: Shape, causal: bool) -> Shape:
    return shape._replace(causal=causal)


@on_every_backend
@drawn
@given(shape=st.builds(either_way, shapes(), st.booleans()), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**20))
def test_any_shape_equals_the_formula_in_float64(backend: str, shape: Shape, dtype: torch.dtype, seed: int) -> None:
    if backend == "reference":  # in half precision it is what the others are allowed to lose
        dtype = torch.float32
    inputs, (grad_out, grad_lse) = random_attention(shape, dtype, seeded(seed)), gradients_of_results(shape)
    grad_out = grad_out.to(dtype)
    out, lse, grads = attention_gradients(inputs, grad_out, grad_lse, backend)
    expected_out, expected_lse, expected = attention_gradients(in_float64(inputs), grad_out, grad_lse, "reference")
    nothing = expected_lse == -torch.inf
    assert_close(out, expected_out, ATTENTION[dtype], "out")
    assert torch.equal(lse == -torch.inf, nothing)
    assert_close(lse[~nothing], expected_lse[~nothing], LSE, "lse")
    plain = expected if backend == "reference" else attention_gradients(inputs, grad_out, grad_lse, "reference")[2]
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert_as_close_as(plain[name], grad, expected[name], dtype, name)


def results(inputs: dict[str, Any], shape: Shape, backend: str) -> dict[str, Tensor]:
    out, lse, grads = attention_gradients(inputs, *gradients_of_results(shape), backend)
    return {"out": out, "lse": lse, **grads}


@on_every_backend
@settings(drawn, max_examples=EXAMPLES // 2)
@given(shape=shapes(), seed=st.integers(0, 2**20))
def test_what_no_query_retrieved_may_hold_anything(backend: str, shape: Shape, seed: int) -> None:
    inputs = random_attention(shape, torch.float32, seeded(seed))
    before = results(inputs, shape, backend)
    used = torch.zeros(inputs["memory_keys"].shape[:2], dtype=torch.bool)
    of_head = inputs["rows"].reshape(shape.batch, -1, 1, 1).repeat_interleave(shape.heads // shape.groups, dim=1)
    found = inputs["slots"] >= 0
    used[of_head.expand_as(found)[found], inputs["slots"][found].long()] = True
    rings = {name: inputs[name].masked_fill(~used[..., None], torch.nan) for name in ("memory_keys", "memory_values")}
    after = results({**inputs, **rings}, shape, backend)
    assert all(torch.equal(before[name], after[name]) for name in before)


@on_every_backend
@settings(drawn, max_examples=EXAMPLES // 2)
@given(shape=shapes().filter(lambda shape: shape.length > 1), seed=st.integers(0, 2**20))
def test_no_query_knows_of_later_tokens(backend: str, shape: Shape, seed: int) -> None:
    """Not in what it gives, and not in what its gradient asks of them."""
    inputs = random_attention(shape, torch.float32, seeded(seed))
    present = shape.length // 2
    out, lse = memory_attention(**inputs, backend=backend)
    later = {name: inputs[name].clone() for name in ("query", "key", "value", "scores")}
    later["query"][:, :, present:] = 7.0
    later["scores"][:, :, present:] = 7.0
    for name in ("key", "value"):
        later[name][:, :, shape.local - shape.length + present :] = 7.0
    after, after_lse = memory_attention(**{**inputs, **later}, backend=backend)
    assert torch.equal(after[:, :, :present], out[:, :, :present])
    assert torch.equal(after_lse[:, :, :present], lse[:, :, :present])

    grad_out, grad_lse = gradients_of_results(shape)
    grad_out[:, :, present:], grad_lse[:, :, present:] = 0.0, 0.0
    _, _, grads = attention_gradients(inputs, grad_out, grad_lse, backend)
    assert (grads["query"][:, :, present:] == 0.0).all()
    for name in ("key", "value"):
        assert (grads[name][:, :, shape.local - shape.length + present :] == 0.0).all()
