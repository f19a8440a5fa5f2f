"""Logits of the keys in given slots as an operator with a gradient for the query."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memtrans_kernels import backends
from memtrans_kernels.eager import is_differentiated_by_transform, is_plain
from memtrans_kernels.ops.derivatives import formula, second, through_formula
from memtrans_kernels.precision import arithmetic_dtype


def gather_logits(query: Tensor, keys: Tensor, rows: Tensor, slots: Tensor, backend: str) -> Tensor:
    """Differentiable in the query; the keys may not require a gradient."""
    arguments = (query, keys, rows, slots)
    if is_plain(*arguments):
        if torch.is_grad_enabled() and query.requires_grad:
            return _GatherLogits.apply(*arguments, backend)
        return backends.run("gather_logits", backend, *arguments)
    if is_differentiated_by_transform(*arguments):
        return formula("gather_logits", backend, "derivatives by torch.func and in forward mode")(*arguments)
    return _gather_logits(*arguments, backend)


@torch.library.custom_op("memtrans::gather_logits", mutates_args=())
def _gather_logits(query: Tensor, keys: Tensor, rows: Tensor, slots: Tensor, backend: str = "auto") -> Tensor:
    return backends.run("gather_logits", backend, query, keys, rows, slots)


@_gather_logits.register_fake
def _(query: Tensor, keys: Tensor, rows: Tensor, slots: Tensor, backend: str = "auto") -> Tensor:
    return slots.new_empty(slots.shape, dtype=arithmetic_dtype(query, keys))


@torch.library.custom_op("memtrans::gather_logits_backward", mutates_args=())
def _gather_logits_backward(
    grad: Tensor, query: Tensor, keys: Tensor, rows: Tensor, slots: Tensor, backend: str = "auto"
) -> Tensor:
    return backends.run("gather_logits_backward", backend, grad, query, keys, rows, slots)


@_gather_logits_backward.register_fake
def _(grad: Tensor, query: Tensor, *_: Any, **__: Any) -> Tensor:
    return query.new_empty(query.shape)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = grad, *ctx.saved_tensors
    none = (None, None, None, None)
    if not is_plain(*tensors):
        return _gather_logits_backward(*tensors, ctx.backend), *none
    if not torch.is_grad_enabled():
        return backends.run("gather_logits_backward", ctx.backend, *tensors), *none
    if backends.named("gather_logits", ctx.backend) == "reference":
        query, *others = ctx.saved_tensors
        logits = backends.formula("gather_logits")
        return *through_formula(lambda given: (logits(*given, *others),), (query,), (grad,)), *none
    return second(
        "gather_logits",
        ctx.backend,
        lambda: backends.run("gather_logits_backward", ctx.backend, *tensors),
        *tensors[:2],
    ), *none


_gather_logits.register_autograd(_backward, setup_context=_setup)


class _GatherLogits(torch.autograd.Function):
    """The same gradient without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, backend = arguments
        logits = backends.run("gather_logits", backend, *tensors)
        _setup(ctx, arguments, logits)
        return logits

    backward = staticmethod(_backward)
