"""`memory_attention` is one softmax over retrieved and local logits, in the words of a loop over queries."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.cases import (
    BATCH,
    DIFFERENTIABLE,
    GROUPS,
    HEADS,
    LENGTH,
    LOCAL,
    NEIGHBOURS,
    SHAPES,
    WIDTH,
    Shape,
    attention_gradients,
    attention_inputs,
    gradients_of_results,
    in_float64,
    random_attention,
)
from helpers.checks import ATTENTION, LSE, assert_close
from helpers.devices import DEVICE, default_dtype, live_backends, seeded

from memtrans_kernels import local_attention, memory_attention
from memtrans_kernels.attention_inputs import AttentionInputs
from memtrans_kernels.impl.reference.philox import keep_mask

pytestmark = pytest.mark.device

on_every_backend = pytest.mark.parametrize("backend", live_backends("memory_attention"))
# Triton's interpreter truncates where it should round to bfloat16
DTYPES = [torch.float32, torch.float16] if DEVICE == "cpu" else list(ATTENTION)


def attend_in_a_loop(inputs, b: int, h: int, n: int) -> tuple[torch.Tensor, float]:
    """out (D,) and lse of one query, written as the formula is."""
    group, query = h * GROUPS // HEADS, inputs["query"][b, h, n]
    logits, values = [], []
    row = inputs["rows"][b * GROUPS + group]
    for score, slot in zip(inputs["scores"][b, h, n], inputs["slots"][b, h, n], strict=True):
        if slot >= 0:
            offset = inputs["memory_offset"][h] if "memory_offset" in inputs else 0.0
            logits.append(inputs["scale"][h] * score + offset)
            values.append(inputs["memory_values"][row, slot])
    for position in range(LOCAL):
        distance = LOCAL - LENGTH + n - position
        if distance < 0 or ("local_length" in inputs and position < LOCAL - inputs["local_length"][b]):
            continue
        logit = inputs["scale"][h] * (query @ inputs["key"][b, group, position])
        if "bias_table" in inputs:
            logit = logit + inputs["bias_table"][h, min(distance, inputs["bias_table"].shape[1] - 1)]
        if "bias_dense" in inputs:
            logit = logit + inputs["bias_dense"][0, h, n, position]
        logits.append(logit)
        values.append(inputs["value"][b, group, position])
    lse = torch.stack(logits).logsumexp(0)
    return torch.stack([(logit - lse).exp() * value for logit, value in zip(logits, values, strict=True)]).sum(0), lse


@pytest.mark.parametrize("bias", [None, "table", "dense"])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("local_length", [False, True])
@pytest.mark.parametrize("entries", [(), (2,), (6, 6, 6)], ids=["empty", "fewer than K", "wrapped"])
def test_it_is_one_softmax(bias, offset, local_length, entries):
    torch.manual_seed(0)
    inputs = attention_inputs(torch.float64, bias=bias, offset=offset, local_length=local_length, entries=entries)
    out, lse = memory_attention(**inputs)
    for b in range(BATCH):
        for h in range(HEADS):
            for n in range(LENGTH):
                expected_out, expected_lse = attend_in_a_loop(inputs, b, h, n)
                torch.testing.assert_close(out[b, h, n], expected_out)
                torch.testing.assert_close(lse[b, h, n], expected_lse)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_backend_equals_the_formula_in_float64(backend, dtype, shape):
    inputs = random_attention(shape, dtype, seeded(0))
    out, lse = memory_attention(**inputs, backend=backend)
    expected_out, expected_lse = memory_attention(**in_float64(inputs), backend="reference")
    nothing = expected_lse == -torch.inf
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close(out, expected_out, ATTENTION[dtype])
    assert_close(lse[~nothing], expected_lse[~nothing], LSE)
    assert (lse[nothing] == -torch.inf).all() and (out[nothing] == 0.0).all()


@pytest.mark.parametrize("bias", [None, "table", "dense"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck_of_everything_but_the_retrieved_logits_query(bias, dropout_p):
    """The scores are handed in, so the query is checked through the local part; `test_gradients` has both parts."""
    torch.manual_seed(0)
    inputs = attention_inputs(torch.float64, bias=bias, local_length=True)
    inputs["query"] = inputs["query"].detach()
    names = [name for name in DIFFERENTIABLE if name in inputs and name != "query"]

    def attend(*tensors):
        return memory_attention(**{**inputs, **dict(zip(names, tensors, strict=True))}, dropout_p=dropout_p, seed=SEED)

    assert torch.autograd.gradcheck(attend, tuple(inputs[name] for name in names), fast_mode=True)


SEED = torch.tensor(2**40 + 5)


def test_the_query_gradient_goes_through_the_retrieved_logits_too():
    torch.manual_seed(0)
    inputs = attention_inputs(torch.float64)

    def attend(query):
        row = inputs["rows"].reshape(BATCH, GROUPS).repeat_interleave(HEADS // GROUPS, 1)[:, :, None, None]
        retrieved = inputs["memory_keys"][row, inputs["slots"].long()]
        scores = torch.einsum("bhnd,bhnkd->bhnk", query, retrieved).detach()
        return memory_attention(**{**inputs, "query": query, "scores": scores})

    assert torch.autograd.gradcheck(attend, inputs["query"].detach().requires_grad_())


def test_no_gradient_reaches_the_memory():
    inputs = attention_inputs()
    inputs["memory_values"].requires_grad_()
    memory_attention(**inputs)[0].sum().backward()
    assert inputs["memory_values"].grad is None


@on_every_backend
def test_a_later_token_changes_nothing_earlier(backend):
    inputs = attention_inputs()
    before, _ = memory_attention(**inputs, backend=backend)
    changed = {name: inputs[name].detach().clone() for name in ("query", "key", "value")}
    for name in changed:
        changed[name][:, :, -1] = 1e3
    after, _ = memory_attention(**{**inputs, **changed}, backend=backend)
    assert torch.equal(after[:, :, :-1], before[:, :, :-1])


@on_every_backend
def test_a_slot_that_was_not_retrieved_changes_nothing_whatever_it_holds(backend):
    inputs = attention_inputs(entries=(2,))
    before, _ = memory_attention(**inputs, backend=backend)
    memory_values = torch.full_like(inputs["memory_values"], torch.nan)
    memory_values[:, :2] = inputs["memory_values"][:, :2]
    after, _ = memory_attention(**{**inputs, "memory_values": memory_values}, backend=backend)
    assert (inputs["slots"] == -1).any() and torch.equal(after, before)


@on_every_backend
def test_a_query_with_nothing_to_attend_to_gives_zeros_and_minus_infinity(backend):
    inputs = attention_inputs(entries=(), bias=None, offset=False)
    inputs["key"] = inputs["value"] = torch.zeros(BATCH, GROUPS, 0, WIDTH)
    out, lse = memory_attention(**inputs, backend=backend)
    (out.sum() + lse.exp().sum()).backward()
    assert torch.equal(out, torch.zeros_like(out)) and (lse == -math.inf).all()
    assert torch.equal(inputs["query"].grad, torch.zeros_like(inputs["query"]))


def test_the_two_parts_merge_by_their_lse():
    inputs = attention_inputs(torch.float64)
    whole, whole_lse = memory_attention(**inputs)
    nothing = torch.zeros(BATCH, GROUPS, 0, WIDTH, dtype=torch.float64)
    memory, memory_lse = memory_attention(**{**inputs, "key": nothing, "value": nothing, "bias_table": None})
    none = {"scores": inputs["scores"][..., :0], "slots": inputs["slots"][..., :0]}
    local, local_lse = memory_attention(**{**inputs, **none})
    lse = torch.logaddexp(memory_lse, local_lse)
    merged = (memory_lse - lse).exp()[..., None] * memory + (local_lse - lse).exp()[..., None] * local
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(lse, whole_lse)


def test_dropout_is_reproducible_and_keeps_the_mean():
    inputs = {name: tensor.detach() for name, tensor in attention_inputs(torch.float64).items()}
    plain, lse = memory_attention(**inputs)
    seeds = [torch.tensor(seed) for seed in range(4000)]
    first, dropped_lse = memory_attention(**inputs, dropout_p=0.25, seed=seeds[0])
    assert torch.equal(first, memory_attention(**inputs, dropout_p=0.25, seed=seeds[0])[0])
    assert not torch.equal(first, memory_attention(**inputs, dropout_p=0.25, seed=seeds[1])[0])
    assert torch.equal(lse, dropped_lse)
    masks = torch.stack([keep_mask(seed, 0.25, (1, 1, 1, NEIGHBOURS + LOCAL)).double() for seed in seeds])
    assert_close(masks.mean(0), torch.full_like(masks[0], 0.75), 5 * math.sqrt(0.25 * 0.75 / len(seeds)))
    some = torch.stack([memory_attention(**inputs, dropout_p=0.25, seed=seed)[0] for seed in seeds[:400]])
    standard_error = some.std(0) / math.sqrt(len(some))
    assert ((some.mean(0) - plain).abs() <= 5 * standard_error).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_of_the_reference_accumulates_in_float32(dtype):
    torch.manual_seed(0)
    inputs = {name: tensor.detach() for name, tensor in attention_inputs().items()}
    low = {name: tensor.to(dtype) for name, tensor in inputs.items() if name in ("query", "key", "value")}
    out, lse = memory_attention(**{**inputs, **low}, backend="reference")
    widened = {name: tensor.float() for name, tensor in low.items()}
    wide, wide_lse = memory_attention(**{**inputs, **widened}, backend="reference")
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert torch.equal(out, wide.to(dtype)) and torch.equal(lse, wide_lse)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"query": torch.zeros(BATCH, HEADS, LENGTH, 3)},
            ValueError,
            r"key must have shape \(B, G, L, D\) with B=2, D=3",
        ),
        (
            {"slots": torch.zeros(BATCH, HEADS, LENGTH, NEIGHBOURS)},
            TypeError,
            "slots must be torch.int32, got torch.float32",
        ),
        ({"scale": torch.ones(3)}, ValueError, r"scale must have shape \(H\) with H=4, got \(3,\)"),
        (
            {"memory_keys": torch.zeros(()).expand(BATCH * GROUPS + 1, 2**30 + 1, WIDTH)},
            ValueError,
            "memory_keys must have at most 1073741824 slots in a row, got 1073741825",
        ),
        ({"rows": torch.tensor([0, 1])}, ValueError, "rows must have B·G=4 entries, got 2"),
        ({"rows": torch.tensor([0, 1, 2, 99])}, ValueError, r"rows must be in \[0, \d+\], got \[0, 1, 2, 99\]"),
        ({"slots": attention_inputs()["slots"] - 2}, ValueError, r"slots must be in \[-1, \d+\], got "),
        ({"slots": attention_inputs()["slots"] + 99}, ValueError, r"slots must be in \[-1, \d+\], got "),
        ({"local_length": torch.tensor([-1, 0])}, ValueError, r"local_length must be in \[0, \d+\], got \[-1, 0\]"),
        ({"bias_table": torch.zeros(4, 0)}, ValueError, r"bias_table must have at least one distance, .*\(4, 0\)"),
        ({"bias_dense": torch.zeros(())}, ValueError, r"bias_dense must have shape \(B, H, N, L\) .* got \(\)"),
        ({"bias_dense": [0.0]}, TypeError, "bias_dense must be a torch.Tensor, got list"),
        ({"dropout_p": 0.5, "seed": torch.tensor([1])}, ValueError, r"seed must have shape \(\), got \(1,\)"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": 0.5}, ValueError, "seed must be an int64 tensor when dropout_p > 0, got None"),
        ({"backend": "cuda"}, ValueError, "backend must be one of auto, reference, triton, native, faiss, got 'cuda'"),
        ({"backend": "faiss"}, RuntimeError, "backend='faiss' cannot run memory_attention on cpu"),
    ],
)
def test_errors_name_argument_value_and_expectation(change, error, message):
    with pytest.raises(error, match=message):
        memory_attention(**{**attention_inputs(), **change})


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
        ({"key": None}, TypeError, "key must be a torch.Tensor, got NoneType"),
        ({"query": torch.zeros(())}, ValueError, r"query must have shape \(B, H, N, D\), got \(\)"),
        ({"query": torch.zeros(1, 2, 3)}, ValueError, r"query must have shape \(B, H, N, D\), got \(1, 2, 3\)"),
        ({"key": torch.zeros(4)}, ValueError, r"key must have shape \(B, G, L, D\) with B=1, D=4, got \(4,\)"),
        ({"value": torch.zeros(1, 1, 5, 4)}, ValueError, r"value must have shape .* L=3, got \(1, 1, 5, 4\)"),
        ({"query": torch.zeros(1, 2, 3, 4).int()}, TypeError, "query must be floating point, got torch.int32"),
    ],
)
def test_errors_of_attention_without_a_memory_name_them_too(change, error, message):
    local = {"query": torch.zeros(1, 2, 3, 4), "key": torch.zeros(1, 1, 3, 4), "value": torch.zeros(1, 1, 3, 4)}
    with pytest.raises(error, match=message):
        local_attention(**{**local, "scale": torch.ones(2), **change})


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_21_16_attention_without_a_memory_is_the_same_whatever_the_default_is(backend, dtype):
    """A float64 among the arguments would keep every fast backend from running."""
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    arguments = {"query": query, "key": key, "value": value, "scale": torch.ones(4), "backend": backend}
    expected = local_attention(**arguments)
    with default_dtype(dtype):
        found = local_attention(**arguments)
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.dtype == torch.float32 and torch.equal(actual, wanted)


WRONG_SEEDS = {
    "none": (None, ValueError, "seed must be an int64 tensor when dropout_p > 0, got None"),
    "nothing in it": (torch.zeros(0, dtype=torch.int64), ValueError, r"seed must have shape \(\), got \(0,\)"),
    "three numbers": (torch.zeros(3, dtype=torch.int64), ValueError, r"seed must have shape \(\), got \(3,\)"),
    "of 32 bits": (torch.tensor(1, dtype=torch.int32), TypeError, "seed must be torch.int64, got torch.int32"),
}


@on_every_backend
@pytest.mark.parametrize("wrong", WRONG_SEEDS)
def test_21_1_the_operators_themselves_read_no_seed_that_is_not_one_number(backend, wrong):
    """A kernel would read whatever lies where the number should be."""
    seed, error, message = WRONG_SEEDS[wrong]
    inputs = AttentionInputs(**random_attention(Shape(dropout_p=0.2), torch.float32, seeded(0)))
    out, lse = torch.ops.memtrans.memory_attention(*inputs)
    inputs = inputs._replace(seed=seed)
    with pytest.raises(error, match=message):
        torch.ops.memtrans.memory_attention(*inputs, backend=backend)
    with pytest.raises(error, match=message):
        torch.ops.memtrans.memory_attention_backward(out, lse, out, lse, *inputs, None, None, 0, backend=backend)


@on_every_backend
@pytest.mark.parametrize(
    "form", ["table inside one tile, groups", "table over two tiles, masked", "no neighbours at all"]
)
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_21_13_no_query_sees_a_local_key_after_it_that_is_not_finite(backend, form, number):
    shape, last = SHAPES[form]._replace(local_length=False), 3
    inputs = random_attention(shape, torch.float32, seeded(0))
    expected = memory_attention(**inputs, backend=backend)
    inputs["key"][:, :, shape.local - shape.length + last] = number
    for actual, wanted in zip(memory_attention(**inputs, backend=backend), expected, strict=True):
        assert torch.equal(actual[:, :, :last], wanted[:, :, :last])
        assert not actual[:, :, last:].isfinite().all()


@on_every_backend
@pytest.mark.parametrize("distances", [0, 9], ids=["alone", "beside a table"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_dense_bias_of_keys_after_their_query_may_hold_anything(backend, distances, number):
    shape = Shape(batch=1, length=40, local=45, dense=1, distances=distances)
    inputs, upstream = random_attention(shape, torch.float32, seeded(0)), gradients_of_results(shape)
    hidden = torch.arange(shape.local) > torch.arange(shape.length)[:, None] + shape.local - shape.length
    other = inputs | {"bias_dense": inputs["bias_dense"].masked_fill(hidden, number)}
    (*expected, wanted), (*actual, grads) = (
        attention_gradients(given, *upstream, backend) for given in (inputs, other)
    )
    assert all(map(torch.equal, actual, expected))
    assert all(torch.equal(grads[name], wanted[name]) for name in wanted)


@on_every_backend
@pytest.mark.parametrize("length", [1, 40])
def test_a_bias_by_distance_that_is_not_a_number_is_not_passed_over(backend, length):
    inputs = random_attention(Shape(length=length, local=40, distances=9), torch.float32, seeded(0))
    inputs["bias_table"][:, 2] = math.nan
    out, lse = memory_attention(**inputs, backend=backend)
    sees = torch.arange(40 - length, 40) >= 2  # a key at that distance
    assert torch.equal(out.isnan().all(dim=-1), sees.expand(lse.shape))
    assert torch.equal(lse.isnan(), sees.expand(lse.shape))
