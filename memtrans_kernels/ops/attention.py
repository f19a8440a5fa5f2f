"""Attention to the neighbours and to the local context as an operator with a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memtrans_kernels import backends, checks
from memtrans_kernels.attention_inputs import NUMBERS, AttentionInputs, strides_by_position
from memtrans_kernels.eager import is_differentiated_by_transform, is_plain, kept
from memtrans_kernels.ledger import Ledger, check_not_stale, note_saved, to_save
from memtrans_kernels.ops.derivatives import formula, second, through_formula
from memtrans_kernels.precision import arithmetic_dtype

Output = tuple[Tensor, Tensor]
DIFFERENTIABLE = ("query", "key", "value", "scale", "bias_table", "bias_dense", "memory_offset", "sink")
OF_KEYS = ("key", "value")  # of these, whose gradients cost as much as all others, none is computed that nobody wants
PLACES_OF_TENSORS = [place for place, name in enumerate(AttentionInputs._fields) if name not in NUMBERS]
PLACES_OF_NUMBERS = [place for place, name in enumerate(AttentionInputs._fields) if name in NUMBERS]
PLACES = [*PLACES_OF_TENSORS, *PLACES_OF_NUMBERS]  # in the order in which a backward pass finds them
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def memory_attention(inputs: AttentionInputs, ledger: Ledger | None, backend: str) -> Output:
    """Differentiable in what DIFFERENTIABLE names."""
    if is_plain(*inputs):
        if torch.is_grad_enabled():
            differentiable = [getattr(inputs, name) for name in DIFFERENTIABLE]
            if any(one is not None and one.requires_grad for one in differentiable):
                return _Attention.apply(*differentiable, inputs, ledger, backend)
        return backends.run("memory_attention", backend, inputs)
    of_ledger = ledger if ledger is not None else (None, None, 0)
    if is_differentiated_by_transform(*inputs):
        return formula("memory_attention", backend, "derivatives by torch.func and in forward mode")(inputs)
    return _memory_attention(*inputs, *of_ledger, backend)


@torch.library.custom_op("memtrans::memory_attention", mutates_args=())
def _memory_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_keys: Tensor,
    memory_values: Tensor,
    rows: Tensor,
    scores: Tensor,
    slots: Tensor,
    scale: Tensor,
    bias_table: Tensor | None = None,
    bias_dense: Tensor | None = None,
    memory_offset: Tensor | None = None,
    local_length: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    causal: bool = True,
    key_mask: Tensor | None = None,
    first: Tensor | None = None,
    soft_cap: float | None = None,
    sink: Tensor | None = None,
    written: Tensor | None = None,
    ticket: Tensor | None = None,
    spare: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    inputs = AttentionInputs(
        query, key, value, memory_keys, memory_values, rows, scores, slots, scale,
        bias_table, bias_dense, memory_offset, local_length, dropout_p, seed, causal, key_mask, first, soft_cap, sink,
    )  # fmt: skip
    checks.dropout(dropout_p, seed)  # again: this operator can be called without the function that asks it
    check_not_stale(written, ticket, spare)
    note_saved(written, ticket)
    out, lse = backends.run("memory_attention", backend, inputs)
    return by_position(out), lse


@_memory_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    of_queries = query.shape[:3]
    shape = (*of_queries, value.shape[3])
    out = query.new_empty_strided(shape, strides_by_position(shape))
    return out, query.new_empty(of_queries, dtype=arithmetic_dtype(query))


@torch.library.custom_op("memtrans::memory_attention_backward", mutates_args=())
def _memory_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_keys: Tensor,
    memory_values: Tensor,
    rows: Tensor,
    scores: Tensor,
    slots: Tensor,
    scale: Tensor,
    bias_table: Tensor | None,
    bias_dense: Tensor | None,
    memory_offset: Tensor | None,
    local_length: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    causal: bool,
    key_mask: Tensor | None,
    first: Tensor | None,
    soft_cap: float | None,
    sink: Tensor | None,
    written: Tensor | None,
    ticket: Tensor | None,
    spare: int,
    of_keys: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    checks.dropout(dropout_p, seed)
    check_not_stale(written, ticket, spare)
    inputs = AttentionInputs(
        query, key, value, memory_keys, memory_values, rows, scores, slots, scale,
        bias_table, bias_dense, memory_offset, local_length, dropout_p, seed, causal, key_mask, first, soft_cap, sink,
    )  # fmt: skip
    grad_query, *others = backends.run(
        "memory_attention_backward", backend, inputs, grad_out, grad_lse, out, lse, of_keys
    )
    return (by_position(grad_query), *others)


@_memory_attention_backward.register_fake
def _(grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> Gradients:
    fields = len(AttentionInputs._fields)
    inputs, others = AttentionInputs(*arguments[:fields]), arguments[fields:]  # arguments at their default are left out
    of_keys = others[3] if len(others) > 3 else True

    def like(name: str) -> Tensor:
        tensor = getattr(inputs, name)
        absent = tensor is None or (name in OF_KEYS and not of_keys)
        return inputs.query.new_empty(0) if absent else tensor.new_empty(tensor.shape)

    _, key, value, scale, table, dense, offset, sink = (like(name) for name in DIFFERENTIABLE)
    query = inputs.query.new_empty_strided(inputs.query.shape, strides_by_position(inputs.query.shape))
    return query, key, value, scale, table, dense, offset, sink


def by_position(tensor: Tensor) -> Tensor:
    """(B, H, N, E) as `strides_by_position` says and compilers count on; a copy where a backend gave it otherwise."""
    strides = strides_by_position(tensor.shape)
    if tensor.stride() == strides:
        return tensor
    return tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)


def _setup(ctx: Any, inputs: tuple, output: Output) -> None:
    *arguments, written, ticket, spare, backend = inputs
    _save(ctx, AttentionInputs(*arguments), output, written, ticket, spare, backend)


def _save(
    ctx: Any,
    inputs: AttentionInputs,
    output: Output,
    written: Tensor | None,
    ticket: Tensor | None,
    spare: int,
    backend: str,
) -> None:
    """Keeps for the backward pass what it needs."""
    ctx.spare, ctx.backend = spare, backend
    ctx.numbers = [inputs[place] for place in PLACES_OF_NUMBERS]
    tensors = [inputs[place] for place in PLACES_OF_TENSORS]
    ctx.save_for_backward(*output, *tensors, written, to_save(written, ticket))


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad
    of_keys = any(wanted[AttentionInputs._fields.index(name)] for name in OF_KEYS)
    inputs, found = _gradients(ctx, grad_out, grad_lse, of_keys)
    by_name = dict(zip(DIFFERENTIABLE, found, strict=True))
    return (*(by_name.get(name) for name in inputs._fields), None, None, None, None)  # ledger's three, backend


def _gradients(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, of_keys: bool
) -> tuple[AttentionInputs, list[Tensor | None]]:
    """The inputs, and the gradients of DIFFERENTIABLE, none of what is not there or wanted.

    grad_out, grad_lse: None for zeros, which autograd would have to write.
    """
    out, lse, *tensors, written, ticket = ctx.saved_tensors  # once: checkpointing recomputes to unpack them
    arguments: list[Any] = [None] * len(AttentionInputs._fields)
    for place, value in zip(PLACES, (*tensors, *ctx.numbers), strict=True):
        arguments[place] = value
    inputs = AttentionInputs(*arguments)
    given = _or_zeros(grad_out, out), _or_zeros(grad_lse, lse), out, lse
    if not is_plain(*given, *inputs):
        rest = written, ticket, ctx.spare, of_keys, ctx.backend
        found: Sequence[Any] = _memory_attention_backward(*given, *inputs, *rest)
    else:
        check_not_stale(written, ticket, ctx.spare)
        if torch.is_grad_enabled():
            found = _differentiable_gradients(inputs, given, of_keys, ctx.backend)
        else:
            found = backends.run("memory_attention_backward", ctx.backend, inputs, *given, of_keys)
    absent = () if of_keys else OF_KEYS
    return inputs, [
        None if getattr(inputs, name) is None or name in absent else grad
        for name, grad in zip(DIFFERENTIABLE, found, strict=True)
    ]


def _or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    return kept(_zero, like.device, like.dtype).expand(like.shape) if grad is None else grad


def _zero(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device)


def _differentiable_gradients(
    inputs: AttentionInputs, given: tuple[Tensor, ...], of_keys: bool, backend: str
) -> Sequence[Any]:
    """For create_graph=True: by the reference's formula, or in a graph that refuses to be differentiated."""
    names = _given(inputs)
    differentiable = [getattr(inputs, name) for name in names]
    if backends.named("memory_attention", backend) == "reference":
        attention, others = backends.formula("memory_attention"), inputs._asdict()

        def output(tensors: Sequence[Tensor]) -> Output:
            return attention(AttentionInputs(**{**others, **dict(zip(names, tensors, strict=True))}))

        found = dict(zip(names, through_formula(output, differentiable, given[:2]), strict=True))
        return [found.get(name) for name in DIFFERENTIABLE]

    def gradients() -> tuple[Tensor, ...]:
        return backends.run("memory_attention_backward", backend, inputs, *given, of_keys)

    return second("memory_attention", backend, gradients, *given[:2], *differentiable)


def _given(inputs: AttentionInputs) -> list[str]:
    """The arguments that have a gradient and are there."""
    return [name for name in DIFFERENTIABLE if getattr(inputs, name) is not None]


_memory_attention.register_autograd(_backward, setup_context=_setup)


class _Attention(torch.autograd.Function):
    """The same gradient without the dispatcher. Autograd gets DIFFERENTIABLE alone: each argument has its price."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Output:
        inputs, ledger, backend = arguments[len(DIFFERENTIABLE) :]
        ctx.set_materialize_grads(False)
        output = backends.run("memory_attention", backend, inputs)
        written, ticket, spare = ledger or (None, None, 0)
        _save(ctx, inputs, output, written, ticket, spare, backend)
        return output

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        of_keys = any(ctx.needs_input_grad[DIFFERENTIABLE.index(name)] for name in OF_KEYS)
        return (*_gradients(ctx, grad_out, grad_lse, of_keys)[1], None, None, None)  # inputs, ledger, backend
