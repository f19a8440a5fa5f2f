"""What says which keys a query sees and how their logits count: each argument of `memory_attention` alone, and in
pairs."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import (
    DIFFERENTIABLE,
    Shape,
    attention_gradients,
    gradients_of_results,
    in_float64,
    random_attention,
)
from helpers.checks import ATTENTION, LSE, SAME_FORMULA, assert_as_close_as, assert_close
from helpers.devices import live_backends, seeded, uninitialised_is_nan
from torch import Tensor

from memtrans_kernels import local_attention, memory_attention

pytestmark = pytest.mark.device

on_every_backend = pytest.mark.parametrize("backend", live_backends("memory_attention_backward"))
ARGUMENTS: dict[str, dict[str, Any]] = {
    "not causal": {"causal": False},
    "key mask": {"key_mask": True},
    "first": {"first": True},
    "soft cap": {"soft_cap": 2.0},
    "sink": {"sink": True},
    "narrow values": {"value_width": 8},
    "wide values": {"value_width": 40},
    "length": {"local_length": True},
}
PAIRS = {" and ".join(pair): ARGUMENTS[pair[0]] | ARGUMENTS[pair[1]] for pair in itertools.combinations(ARGUMENTS, 2)}
del PAIRS["narrow values and wide values"]
BASE = Shape(batch=2, heads=4, groups=2, length=18, local=37, width=24, neighbours=5, distances=9, offset=True)
if os.environ.get("TRITON_INTERPRET") == "1":  # a program takes a tenth of a second there
    BASE = BASE._replace(batch=1, heads=2, groups=1, neighbours=2)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with uninitialised_is_nan():
        yield


def results(inputs: dict[str, Any], shape: Shape, backend: str) -> dict[str, Tensor]:
    out, lse, grads = attention_gradients(inputs, *gradients_of_results(shape), backend)
    return {"out": out, "lse": lse, **grads}


def assert_formula(shape: Shape, backend: str, dtype: torch.dtype = torch.float32) -> None:
    """Out, lse and every gradient are those of the reference in float64."""
    inputs = random_attention(shape, dtype, seeded(0))
    actual, expected = results(inputs, shape, backend), results(in_float64(inputs), shape, "reference")
    plain = expected if backend == "reference" else results(inputs, shape, "reference")
    nothing = expected["lse"] == -torch.inf
    assert torch.equal(actual["lse"] == -torch.inf, nothing)
    assert (actual["out"][nothing] == 0.0).all()
    assert_close(actual["out"], expected["out"], ATTENTION[dtype], "out")
    assert_close(actual["lse"][~nothing], expected["lse"][~nothing], LSE, "lse")
    assert actual.keys() == expected.keys()
    for name in DIFFERENTIABLE:
        if name in actual:
            assert_as_close_as(plain[name], actual[name], expected[name], dtype, name)


@on_every_backend
@pytest.mark.parametrize("change", (ARGUMENTS | PAIRS).values(), ids=ARGUMENTS | PAIRS)
def test_every_argument_alone_and_in_pairs_is_the_formula_in_float64(backend: str, change: dict[str, Any]) -> None:
    assert_formula(BASE._replace(**change), backend)


EVERYTHING = {"key_mask": True, "first": True, "soft_cap": 3.0, "sink": True, "local_length": True, "value_width": 16}


@on_every_backend
@pytest.mark.parametrize(
    "shape",
    {
        "one query": BASE._replace(length=1, **EVERYTHING),
        "one query of many parts": BASE._replace(length=1, local=270, **EVERYTHING),
        "one query without neighbours": BASE._replace(length=1, local=70, neighbours=0, **EVERYTHING),
        "one query without local keys": BASE._replace(length=1, local=0, **EVERYTHING | {"local_length": False}),
        "dropout": BASE._replace(dropout_p=0.3, **EVERYTHING),
        "dense bias, not causal": BASE._replace(batch=2, distances=0, dense=2, causal=False, **EVERYTHING),
        "one column of the table, not causal": BASE._replace(distances=1, causal=False, sink=True),
        "long table, not causal": BASE._replace(length=40, local=70, distances=50, causal=False),
        "far on both sides, not causal": BASE._replace(length=70, local=70, distances=5, causal=False, key_mask=True),
        "width 80": BASE._replace(width=80, length=3),
        "width 112": BASE._replace(width=112, length=3, value_width=72),
        "width 256": BASE._replace(width=256, length=3, batch=1),
        "neighbours 200": BASE._replace(neighbours=200, length=2, batch=1),
        "one query, width 256, neighbours 100": BASE._replace(width=256, neighbours=100, length=1, batch=1),
    }.values(),
    ids=str,
)
def test_forms_of_their_own_are_the_formula_in_float64(backend: str, shape: Shape) -> None:
    assert_formula(shape, backend)


@on_every_backend
@pytest.mark.parametrize("causal", [True, False])
def test_two_passes_give_the_same_bits(backend: str, causal: bool) -> None:
    shape = BASE._replace(causal=causal, **EVERYTHING)
    inputs = random_attention(shape, torch.float16, seeded(0))
    first, second = (results(inputs, shape, backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@on_every_backend
def test_what_no_query_sees_may_hold_anything(backend: str) -> None:
    """Behind the mask, before `first` and `local_length`: neither in results nor in gradients."""
    shape = BASE._replace(**EVERYTHING)
    inputs = random_attention(shape, torch.float32, seeded(0))
    oldest = torch.maximum(inputs["first"].amin(1), shape.local - inputs["local_length"])  # (B,)
    unseen = ~inputs["key_mask"] | (torch.arange(shape.local) < oldest[:, None])
    before = results(inputs, shape, backend)
    other = {name: inputs[name].masked_fill(unseen[:, None, :, None], 7.0) for name in ("key", "value")}
    after = results({**inputs, **other}, shape, backend)
    assert unseen.any(dim=1).all() and all(torch.equal(before[name], after[name]) for name in before)
    for name in ("key", "value"):
        assert (before[name].transpose(1, 2)[unseen] == 0.0).all()


@on_every_backend
def test_a_query_without_any_visible_key_gives_zeros_and_its_gradients_are_zero(backend: str) -> None:
    shape = BASE._replace(neighbours=0, key_mask=True)
    inputs = random_attention(shape, torch.float32, seeded(0)) | {
        "key_mask": torch.zeros(BASE.batch, 37, dtype=torch.bool)
    }
    found = results(inputs, shape, backend)
    assert (found["lse"] == -torch.inf).all()
    assert all((found[name] == 0.0).all() for name in found if name != "lse")


@on_every_backend
def test_with_a_sink_a_query_without_any_visible_key_has_its_lse(backend: str) -> None:
    shape = BASE._replace(neighbours=0, first=True, sink=True)
    inputs = random_attention(shape, torch.float32, seeded(0)) | {"first": torch.full((BASE.batch, 18), 37)}
    out, lse = memory_attention(**inputs, backend=backend)
    assert (out == 0.0).all() and torch.equal(lse, inputs["sink"][:, None].expand(BASE.batch, -1, 18))


@on_every_backend
def test_the_layout_of_mask_and_first_changes_nothing(backend: str) -> None:
    shape = BASE._replace(**EVERYTHING)
    inputs = random_attention(shape, torch.float32, seeded(0))
    names = ("key_mask", "first", "sink")
    spread = {name: torch.stack((inputs[name], inputs[name]), dim=-1)[..., 0] for name in names}
    before, after = (results(given, shape, backend) for given in (inputs, {**inputs, **spread}))
    assert all(torch.equal(before[name], after[name]) for name in before)


# ------------------------------------------------------------------------------------------ PyTorch's attention agrees


def of_pytorch(inputs: dict[str, Any], mask: Tensor) -> Tensor:
    """The local part by scaled_dot_product_attention, with keys shared by groups of heads; mask: (B or 1, H, N, L)."""
    query = inputs["query"] * inputs["scale"][:, None, None]
    return F.scaled_dot_product_attention(query, inputs["key"], inputs["value"], mask, scale=1.0, enable_gqa=True)


def local_inputs(shape: Shape) -> dict[str, Any]:
    wide = in_float64(random_attention(shape._replace(neighbours=0), torch.float32, seeded(0)))
    names = ("query", "key", "value", "scale", "bias_table", "local_length", "causal", "key_mask", "first", "sink")
    return {name: wide[name] for name in names}


def distance_of(shape: Shape) -> Tensor:
    return torch.arange(shape.local - shape.length, shape.local)[:, None] - torch.arange(shape.local)


@pytest.mark.parametrize("causal", [True, False])
def test_pytorch_agrees_about_masks_and_groups(causal: bool) -> None:
    shape = BASE._replace(key_mask=True, first=True, causal=causal)
    inputs, distance = local_inputs(shape), distance_of(shape)
    seen = inputs["key_mask"][:, None, None] & (torch.arange(shape.local) >= inputs["first"][:, None, :, None])
    seen = seen & (distance >= 0) if causal else seen
    bias = inputs["bias_table"][:, distance.abs().clamp(max=shape.distances - 1)]
    nothing = ~seen.any(dim=-1, keepdim=True)
    expected = of_pytorch(inputs, bias.masked_fill(~seen, -torch.inf)).masked_fill(nothing, 0.0)
    assert_close(local_attention(**inputs)[0], expected, SAME_FORMULA)


@on_every_backend
def test_pytorch_agrees_about_a_window_as_a_table_that_ends_in_minus_infinity(backend: str) -> None:
    window = 7
    inputs, distance = local_inputs(BASE), distance_of(BASE)
    inputs["bias_table"] = torch.cat(
        (torch.zeros(BASE.heads, window), torch.full((BASE.heads, 1), -torch.inf)), dim=1
    ).double()
    mask = torch.where((distance >= 0) & (distance < window), 0.0, -torch.inf).double()
    narrow = {name: x.float() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in inputs.items()}
    out, _ = local_attention(**narrow, backend=backend)
    assert_close(out, of_pytorch(inputs, mask), ATTENTION[torch.float32])


def test_a_sink_is_a_key_whose_logit_is_given_and_whose_value_is_zero() -> None:
    inputs, distance = local_inputs(BASE._replace(sink=True)), distance_of(BASE)
    bias = inputs["bias_table"][:, distance.clamp(0, BASE.distances - 1)].masked_fill(distance < 0, -torch.inf)
    bias = torch.cat((bias, inputs["sink"][:, None, None].expand(-1, BASE.length, 1)), dim=-1)[None]
    one_more = {name: F.pad(inputs[name], (0, 0, 0, 1)) for name in ("key", "value")}
    assert_close(local_attention(**inputs)[0], of_pytorch(inputs | one_more, bias), SAME_FORMULA)


def test_a_soft_cap_far_above_all_logits_changes_little_and_a_near_one_bounds_them() -> None:
    inputs = in_float64(random_attention(BASE, torch.float32, seeded(0)))
    plain, _ = memory_attention(**inputs)
    far, _ = memory_attention(**inputs | {"soft_cap": 1e8})
    assert_close(far, plain, SAME_FORMULA)
    unbiased = inputs | {"bias_table": None, "memory_offset": None, "soft_cap": 0.5}
    _, lse = memory_attention(**unbiased)
    count = (inputs["slots"] >= 0).sum(-1) + (distance_of(BASE) >= 0).sum(-1)
    assert ((lse - count.double().log()).abs() <= 0.5).all()


@on_every_backend
@pytest.mark.parametrize("name", ["key mask", "first", "length"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_hidden_key_shows_in_no_result_whatever_it_holds(name: str, number: float, backend: str) -> None:
    shape = BASE._replace(**ARGUMENTS[name])
    inputs = random_attention(shape, torch.float32, seeded(0))
    if name == "first":
        inputs["first"] = torch.full_like(inputs["first"], 7)
    hidden = {
        "key mask": lambda: ~inputs["key_mask"],
        "first": lambda: (torch.arange(BASE.local) < 7).expand(shape.batch, -1),
        "length": lambda: torch.arange(BASE.local) < BASE.local - inputs["local_length"][:, None],
    }[name]()
    assert hidden.any()
    expected = memory_attention(**inputs, backend=backend)
    inputs["key"] = inputs["key"].masked_fill(hidden[:, None, :, None], number)
    for actual, wanted in zip(memory_attention(**inputs, backend=backend), expected, strict=True):
        assert torch.equal(actual, wanted)


# ------------------------------------------------------------------------------------------------------------ misuse


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"causal": 1}, TypeError, "causal must be True or False, got 1"),
        ({"key_mask": torch.ones(2, 36).bool()}, ValueError, r"key_mask must have shape \(B, L\) with B=2, L=37"),
        ({"key_mask": torch.ones(2, 37)}, TypeError, "key_mask must be torch.bool, got torch.float32"),
        ({"first": torch.zeros(2, 17).long()}, ValueError, r"first must have shape \(B, N\) with B=2, N=18"),
        ({"first": torch.zeros(2, 18).int()}, TypeError, "first must be torch.int64, got torch.int32"),
        ({"first": torch.full((2, 18), 38)}, ValueError, r"first must be in \[0, 37\], got \[\[38, 38"),
        ({"soft_cap": 0.0}, ValueError, "soft_cap must be a finite number above 0, or None, got 0.0"),
        ({"soft_cap": True}, ValueError, "soft_cap must be a finite number above 0, or None, got True"),
        ({"sink": torch.zeros(3)}, ValueError, r"sink must have shape \(H\) with H=4, got \(3,\)"),
        ({"sink": torch.zeros(4).long()}, TypeError, "sink must be floating point, got torch.int64"),
        ({"value": torch.zeros(2, 2, 37, 23)}, ValueError, r"memory_values must have shape .* E=23, got \(5, 40, 24\)"),
    ],
)
def test_errors_name_argument_value_and_expectation(change: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        memory_attention(**random_attention(BASE, torch.float32, seeded(0)) | change)
