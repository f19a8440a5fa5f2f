"""Unit queries and keys as an operator with a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memtrans_kernels import backends
from memtrans_kernels.eager import is_differentiated_by_transform, is_plain
from memtrans_kernels.ops.derivatives import formula, second, through_formula


def cosine(query: Tensor, key: Tensor, dtype: torch.dtype | None, backend: str) -> tuple[Tensor, Tensor]:
    """Differentiable in both."""
    if is_plain(query, key):
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
            return _Cosine.apply(query, key, dtype, backend)
        return backends.run("cosine", backend, query, key, dtype)
    if is_differentiated_by_transform(query, key):
        return formula("cosine", backend, "derivatives by torch.func and in forward mode")(query, key, dtype)
    return _cosine(query, key, dtype, backend)


@torch.library.custom_op("memtrans::cosine", mutates_args=())
def _cosine(
    query: Tensor, key: Tensor, dtype: torch.dtype | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    return backends.run("cosine", backend, query, key, dtype)


@_cosine.register_fake
def _(query: Tensor, key: Tensor, dtype: torch.dtype | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape, dtype=dtype), key.new_empty(key.shape, dtype=dtype)


@torch.library.custom_op("memtrans::cosine_backward", mutates_args=())
def _cosine_backward(
    grad_query: Tensor, grad_key: Tensor, query: Tensor, key: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    return backends.run("cosine_backward", backend, grad_query, grad_key, query, key)


@_cosine_backward.register_fake
def _(grad_query: Tensor, grad_key: Tensor, query: Tensor, key: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, ctx.dtype, ctx.backend = inputs
    ctx.save_for_backward(query, key)


def _backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
    tensors = grad_query, grad_key, *ctx.saved_tensors
    if not is_plain(*tensors):
        return (*_cosine_backward(*tensors, ctx.backend), None, None)
    if not torch.is_grad_enabled():
        return (*backends.run("cosine_backward", ctx.backend, *tensors), None, None)
    if backends.named("cosine", ctx.backend) == "reference":
        unit = backends.formula("cosine")
        grads = through_formula(lambda given: unit(*given, ctx.dtype), ctx.saved_tensors, (grad_query, grad_key))
        return (*grads, None, None)
    return (
        *second("cosine", ctx.backend, lambda: backends.run("cosine_backward", ctx.backend, *tensors), *tensors),
        None,
        None,
    )


_cosine.register_autograd(_backward, setup_context=_setup)


class _Cosine(torch.autograd.Function):
    """The same gradient without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, dtype: torch.dtype | None, backend: str) -> tuple[Tensor, Tensor]:
        output = backends.run("cosine", backend, query, key, dtype)
        _setup(ctx, (query, key, dtype, backend), output)
        return output

    backward = staticmethod(_backward)
