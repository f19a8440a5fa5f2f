"""The compiled attention on the CPU: threads, cuts, mixed dtypes, what auto leaves to it, misuse."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers.cases import SHAPES, Shape, attention_gradients, gradients_of_results, in_float64, random_attention
from helpers.checks import ATTENTION, LSE, assert_as_close_as, assert_close
from helpers.devices import seeded, threads
from torch import Tensor

from memtrans_kernels import native
from memtrans_kernels.attention_inputs import AttentionInputs
from memtrans_kernels.backends import resolve
from memtrans_kernels.impl.reference import memory_attention as reference_attention

WIDE = Shape(
    batch=3, heads=4, groups=2, length=150, local=170, width=40, neighbours=9, distances=33, offset=True,
    local_length=True, dropout_p=0.2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _extension() -> None:
    live, reason = native.status()
    assert live, f"the extension must be built for these tests: {reason}"


def everything(shape: Shape, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    out, lse, grads = attention_gradients(
        random_attention(shape, dtype, seeded(0)), *gradients_of_results(shape), "native"
    )
    return {"out": out, "lse": lse, **grads}


@pytest.mark.parametrize("dense", [0, 1, 3], ids=["no dense bias", "one of all documents", "one of each document"])
def test_the_bits_do_not_depend_on_the_number_of_threads(dense: int) -> None:
    with threads(1):
        expected = everything(WIDE._replace(dense=dense))
    for count in (2, 3):
        with threads(count):
            actual = everything(WIDE._replace(dense=dense))
        assert all(torch.equal(actual[name], expected[name]) for name in expected), f"{count} threads"


@pytest.mark.parametrize("length", [1, 16, 17, 31, 32, 33, 63, 64, 65, 129])
@pytest.mark.parametrize("width", [1, 16, 17])
def test_every_cut_into_blocks_and_tiles_is_the_formula(length: int, width: int) -> None:
    shape = Shape(length=length, local=length + 7, width=width, distances=40)
    inputs, upstream = random_attention(shape, torch.float32, seeded(0)), gradients_of_results(shape)
    out, lse, grads = attention_gradients(inputs, *upstream, "native")
    expected_out, expected_lse, expected = attention_gradients(in_float64(inputs), *upstream, "reference")
    assert_close(out, expected_out, ATTENTION[torch.float32], "out")
    assert_close(lse, expected_lse, LSE, "lse")
    plain = attention_gradients(inputs, *upstream, "reference")[2]
    for name, grad in grads.items():
        assert_as_close_as(plain[name], grad, expected[name], torch.float32, name)


@pytest.mark.parametrize("keys", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("values", [torch.float32, torch.float16, torch.bfloat16])
def test_keys_and_values_of_a_ring_may_have_types_of_their_own(keys: torch.dtype, values: torch.dtype) -> None:
    shape = SHAPES["table inside one tile, groups"]
    inputs, upstream = random_attention(shape, torch.float32, seeded(0)), gradients_of_results(shape)
    inputs |= {"memory_keys": inputs["memory_keys"].to(keys), "memory_values": inputs["memory_values"].to(values)}
    out, _, grads = attention_gradients(inputs, *upstream, "native")
    expected_out, _, expected = attention_gradients(in_float64(inputs), *upstream, "reference")
    assert_close(out, expected_out, ATTENTION[torch.float32], "out")
    for name, grad in grads.items():
        assert_close(grad, expected[name], ATTENTION[torch.float32], name)


def test_nan_shows() -> None:
    """Training has to notice it: neither the maximum nor exp may lose it."""
    for name in ("query", "key", "value"):
        inputs = random_attention(Shape(), torch.float32, seeded(0))
        inputs[name][0, 0, 0, 0] = torch.nan
        out, _ = native.memory_attention(AttentionInputs(**inputs))
        assert out[0, 0, 0].isnan().any(), name
        assert out[1].isfinite().all(), name
    inputs = random_attention(SHAPES["no local keys"], torch.float32, seeded(0))
    inputs["scale"][0] = torch.nan
    out, lse = native.memory_attention(AttentionInputs(**inputs))
    found = (inputs["slots"][:, 0] >= 0).any(dim=-1)
    assert torch.equal(out[:, 0].isnan().any(dim=-1), found) and torch.equal(lse[:, 0].isnan(), found)


def test_no_heads_are_no_error() -> None:
    inputs = random_attention(Shape(), torch.float32, seeded(0))
    of_heads = {"query": (2, 0, 5, 32), "scores": (2, 0, 5, 5), "scale": (0,)}
    inputs |= {name: torch.zeros(shape) for name, shape in of_heads.items()} | {"slots": inputs["slots"][:, :0]}
    out, lse = native.memory_attention(AttentionInputs(**inputs))
    assert out.shape == (2, 0, 5, 32) and lse.shape == (2, 0, 5)


def test_auto_leaves_float64_to_the_reference() -> None:
    inputs = random_attention(Shape(), torch.float32, seeded(0))
    given, wide = AttentionInputs(**inputs), AttentionInputs(**in_float64(inputs))
    assert resolve("memory_attention", "auto", given) is native.memory_attention
    assert resolve("memory_attention", "auto", wide) is reference_attention.memory_attention
    with pytest.raises(RuntimeError, match="native: it computes in float32, not in float64"):
        resolve("memory_attention", "native", wide)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 2, 5)}, "query must have shape (B, H, N, D), got (2, 2, 5)"),
        ({"key": torch.zeros(2, 1, 4, 32)}, "key must have L of 0 or at least N = 5, got 4"),
        ({"value": torch.zeros(2, 1, 4, 32)}, "value must have shape (B, G, L, E) = (2, 1, 5, 32), got (2, 1, 4, 32)"),
        ({"memory_values": torch.zeros(3, 39, 32)}, "memory_values must have shape (R, M + S, E) = (3, 40, 32)"),
        ({"value": torch.zeros(2, 1, 5, 31)}, "memory_values must have shape (R, M + S, E) = (3, 40, 31)"),
        ({"key_mask": torch.ones(2, 4).bool()}, "key_mask must have shape (B, L) = (2, 5), got (2, 4)"),
        ({"key_mask": torch.ones(2, 5)}, "key_mask must be bool"),
        ({"first": torch.zeros(2, 4).long()}, "first must have shape (B, N) = (2, 5), got (2, 4)"),
        ({"first": torch.full((2, 5), 6)}, "first must lie in 0..5, got 6"),
        ({"soft_cap": -1.0}, "soft_cap must be above 0, got -1"),
        ({"sink": torch.zeros(1)}, "sink must have shape (H,) = (2), got (1)"),
        ({"scale": torch.ones(1)}, "scale must have shape (H,) = (2), got (1)"),
        ({"scores": torch.zeros(2, 2, 5, 5).double()}, "scores must be float32, float16 or bfloat16"),
        ({"slots": torch.zeros(2, 2, 5, 5).long()}, "slots must be int32"),
        ({"slots": torch.full((2, 2, 5, 5), 40).int()}, "slots must lie in -1..39, got 40..40"),
        ({"slots": torch.full((2, 2, 5, 5), -2).int()}, "slots must lie in -1..39, got -2..-2"),
        ({"rows": torch.tensor([0, 3])}, "rows must lie in 0..2, got 3"),
        ({"bias_table": torch.zeros(2, 0)}, "bias_table must have H = 2 rows of at least one distance, got (2, 0)"),
        ({"bias_dense": torch.zeros(3, 2, 5, 5)}, "bias_dense must have shape (1 or B, H, N, L) = (2, 2, 5, 5)"),
        ({"local_length": torch.tensor([6, 0])}, "local_length must lie in 0..5, got 6"),
        ({"dropout_p": 0.5, "seed": None}, "seed must be given when dropout_p > 0"),
        ({"dropout_p": 0.5, "seed": torch.zeros(0, dtype=torch.int64)}, "seed must have shape (), got (0)"),
        ({"dropout_p": 0.5, "seed": torch.zeros(3, dtype=torch.int64)}, "seed must have shape (), got (3)"),
    ],
)
def test_misuse_raises_instead_of_reading_elsewhere(change: dict[str, Any], message: str) -> None:
    inputs = {**random_attention(Shape(), torch.float32, seeded(0)), **change}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        native.memory_attention(AttentionInputs(**inputs))


def test_operators_pass_opcheck() -> None:
    inputs = random_attention(Shape(distances=3), torch.float32, seeded(0))
    given = AttentionInputs(**inputs)._replace(soft_cap=0.0)
    out, lse = native.memory_attention(given)
    operators = torch.ops.memtrans
    torch.library.opcheck(operators.native_memory_attention.default, tuple(given), test_utils="test_schema")
    backward = (out, lse, out, lse, *given)
    torch.library.opcheck(operators.native_memory_attention_backward.default, backward, test_utils="test_schema")
