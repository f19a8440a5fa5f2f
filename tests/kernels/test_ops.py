"""The registered operators keep torch's rules: schemas, fakes, gradients and functionalisation."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import (
    BATCH,
    CAPACITY,
    DIFFERENTIABLE,
    HEADS,
    LENGTH,
    NEIGHBOURS,
    WIDTH,
    Shape,
    attention_inputs,
    random_attention,
    ring,
)
from helpers.devices import DEVICE, seeded

from memtrans_kernels.attention_inputs import AttentionInputs

pytestmark = pytest.mark.device

ops = torch.ops.memtrans
EVERY_ARGUMENT = Shape(
    heads=4, groups=2, local=8, width=8, distances=3, dense=1, offset=True, local_length=True, dropout_p=0.2,
    causal=False, key_mask=True, first=True, soft_cap=2.0, sink=True, value_width=16,
)  # fmt: skip


def _ring_write():
    state = ring()
    del state["start"]
    new_keys, new_values = torch.randn(2, 2, 2, 3, 8)
    return (*state.values(), new_keys, new_values, torch.tensor([3, 0, 2, 1]), state["cursor"].clone())


def _search():
    state = ring()
    arguments = (state["keys"], state["rows"], state["start"], state["cursor"], CAPACITY, NEIGHBOURS)
    return (torch.randn(2, 4, 5, 8), *arguments)


def _cosine():
    return torch.randn(2, 4, 5, 8, requires_grad=True), torch.randn(2, 2, 7, 8, requires_grad=True)


def _gather():
    state = ring()
    slots = torch.randint(-1, CAPACITY, (2, 4, 5, NEIGHBOURS), dtype=torch.int32)
    return torch.randn(2, 4, 5, 8, requires_grad=True), state["keys"], state["rows"], slots


def _pairs():
    state = ring(torch.float16)
    slots = torch.randint(-1, CAPACITY, (2, 4, 5, NEIGHBOURS), dtype=torch.int32)
    return state["keys"], state["values"], state["rows"], slots, torch.float32


def _merge():
    scores = torch.randn(2, 1, 2, 3, 4).sort(dim=-1, descending=True).values
    scores[1, ..., 3:] = -torch.inf
    slots = torch.where(scores.isfinite(), torch.arange(4), -1).to(torch.int32)
    return scores, slots, torch.tensor([1]), torch.tensor([3, 9]), 7


def _attention():
    inputs = attention_inputs(local_length=True)
    order = ("bias_table", "bias_dense", "memory_offset", "local_length")
    first = [tensor for name, tensor in inputs.items() if name not in order]
    return (*first, *(inputs.get(name) for name in order), 0.2, torch.tensor(7))


def _attention_of_every_argument():
    """Values of another width, what says which keys are seen, a cap, a sink."""
    inputs = random_attention(EVERY_ARGUMENT, torch.float32, seeded(0))
    leaves = {n: inputs[n].requires_grad_() for n in DIFFERENTIABLE if inputs[n] is not None}
    return tuple(AttentionInputs(**inputs | leaves))


def _whole():
    memory, of_queries = ring(), (BATCH, HEADS, LENGTH)
    memory = {name: memory[name] for name in ("keys", "values", "rows", "start", "cursor")}
    local = torch.randn(*of_queries, WIDTH), torch.randn(of_queries)
    return torch.randn(*of_queries, WIDTH), *memory.values(), CAPACITY, torch.rand(HEADS), *local, torch.randn(HEADS)


def _backward_of(attention):
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in attention]
    inputs = AttentionInputs(*arguments)
    out, lse = ops.memory_attention(*inputs)
    written, ticket = torch.tensor([9] * 5), torch.tensor([7] * 5)
    return (torch.randn_like(out), torch.randn_like(lse), out, lse, *inputs, written, ticket, 4)


CASES = {
    "knn_add_": _ring_write,
    "knn_search": _search,
    "knn_merge": _merge,
    "gather_logits": _gather,
    "gather_pairs": _pairs,
    "gather_logits_backward": lambda: (torch.randn(2, 4, 5, NEIGHBOURS), *(t.detach() for t in _gather())),
    "cosine": _cosine,
    "cosine_backward": lambda: (*(t.detach() for t in _cosine()), *(t.detach() for t in _cosine())),
    "memory_attention": _attention,
    "memory_attention_backward": lambda: _backward_of(_attention()),
    "whole_attention": _whole,
    "read_cursors": lambda: (torch.tensor([3, 4, 5]), torch.tensor([6, 6, 6])),
    "ledger_ticket": lambda: (torch.tensor([3, 4, 5]), [0, 2]),
    "ledger_advance_": lambda: (torch.tensor([3, 4, 5]), torch.tensor([3, 4, 5]), 6),
}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    torch.manual_seed(0)
    torch.library.opcheck(getattr(ops, name), CASES[name]())


def test_opcheck_of_every_argument_of_attention():
    torch.library.opcheck(ops.memory_attention, _attention_of_every_argument())
    torch.library.opcheck(ops.memory_attention_backward, _backward_of(_attention_of_every_argument()))
    torch.library.opcheck(ops.memory_attention_backward, (*_backward_of(_attention_of_every_argument()), False))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("read", "ledger"))])
def test_autocast_rounds_nothing_inside_an_operator(name, backend):
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in CASES[name]()]
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            out = getattr(ops, name)(*arguments, backend=backend)
        results.append([*arguments, *(out if isinstance(out, tuple) else ())])
    for plain, autocast in zip(*results, strict=True):
        assert plain is autocast or torch.equal(torch.as_tensor(plain), torch.as_tensor(autocast))


def test_every_operator_is_checked():
    registered = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "memtrans::" in name
    }
    assert {name for name in registered if not name.startswith("native_")} == set(CASES)
