"""Attention to the neighbours and to the local context as an operator with a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memtrans_kernels import backends
from memtrans_kernels.attention_inputs import AttentionInputs
from memtrans_kernels.eager import is_differentiated_by_transform, is_plain
from memtrans_kernels.ledger import Ledger, check_not_stale, note_saved, to_save
from memtrans_kernels.ops.derivatives import formula, second, through_formula
from memtrans_kernels.precision import arithmetic_dtype

Output = tuple[Tensor, Tensor]
DIFFERENTIABLE = ("query", "key", "value", "scale", "bias_table", "bias_dense", "memory_offset")


def memory_attention(inputs: AttentionInputs, ledger: Ledger | None, backend: str) -> Output:
    """Differentiable in what DIFFERENTIABLE names."""
    of_ledger = ledger if ledger is not None else (None, None, 0)
    if is_plain(*inputs):
        if torch.is_grad_enabled() and any(getattr(inputs, name).requires_grad for name in _given(inputs)):
            return _Attention.apply(*inputs, *of_ledger, backend)
        return backends.run("memory_attention", backend, inputs)
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
    written: Tensor | None = None,
    ticket: Tensor | None = None,
    spare: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    inputs = AttentionInputs(
        query, key, value, memory_keys, memory_values, rows, scores, slots, scale,
        bias_table, bias_dense, memory_offset, local_length, dropout_p, seed,
    )  # fmt: skip
    check_not_stale(written, ticket, spare)
    note_saved(written, ticket)
    return backends.run("memory_attention", backend, inputs)


@_memory_attention.register_fake
def _(query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=arithmetic_dtype(query))


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
    seed: Tensor | None,
    written: Tensor | None,
    ticket: Tensor | None,
    dropout_p: float,
    spare: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_not_stale(written, ticket, spare)
    inputs = AttentionInputs(
        query, key, value, memory_keys, memory_values, rows, scores, slots, scale,
        bias_table, bias_dense, memory_offset, local_length, dropout_p, seed,
    )  # fmt: skip
    return backends.run("memory_attention_backward", backend, inputs, grad_out, grad_lse, out, lse)


@_memory_attention_backward.register_fake
def _(
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
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None) -> Tensor:
        return query.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    return (
        like(query), like(key), like(value), like(scale), like(bias_table), like(bias_dense), like(memory_offset),
    )  # fmt: skip


def _setup(ctx: Any, inputs: tuple, output: Output) -> None:
    *tensors, ctx.dropout_p, seed, written, ticket, ctx.spare, ctx.backend = inputs
    ctx.save_for_backward(*output, *tensors, seed, written, to_save(written, ticket))


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    out, lse, *tensors, seed, written, ticket = ctx.saved_tensors  # once: checkpointing recomputes to unpack them
    inputs = AttentionInputs(*tensors)._replace(dropout_p=ctx.dropout_p, seed=seed)
    given = grad_out, grad_lse, out, lse
    if not is_plain(*given, *inputs):
        rest = seed, written, ticket, ctx.dropout_p, ctx.spare, ctx.backend
        return _in_places(inputs, _memory_attention_backward(*given, *tensors, *rest))
    check_not_stale(written, ticket, ctx.spare)
    if torch.is_grad_enabled():
        return _in_places(inputs, _differentiable_gradients(inputs, given, ctx.backend))
    return _in_places(inputs, backends.run("memory_attention_backward", ctx.backend, inputs, *given))


def _differentiable_gradients(inputs: AttentionInputs, given: tuple[Tensor, ...], backend: str) -> Sequence[Any]:
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
        return backends.run("memory_attention_backward", backend, inputs, *given)

    return second("memory_attention", backend, gradients, *given[:2], *differentiable)


def _given(inputs: AttentionInputs) -> list[str]:
    """The arguments that have a gradient and are there."""
    return [name for name in DIFFERENTIABLE if getattr(inputs, name) is not None]


def _in_places(inputs: AttentionInputs, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients of DIFFERENTIABLE in the places of the operator's arguments, none of what is not there."""
    found = dict(zip(DIFFERENTIABLE, grads, strict=True))
    of_inputs = (found.get(name) if value is not None else None for name, value in inputs._asdict().items())
    return (*of_inputs, None, None, None, None)  # written, ticket, spare, backend


_memory_attention.register_autograd(_backward, setup_context=_setup)


class _Attention(torch.autograd.Function):
    """The same gradient without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Output:
        inputs, backend = AttentionInputs(*arguments[: len(AttentionInputs._fields)]), arguments[-1]
        output = backends.run("memory_attention", backend, inputs)
        _setup(ctx, arguments, output)
        return output

    backward = staticmethod(_backward)
