"""What the differentiable operators share: second derivatives and torch.func, which the reference alone has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from memtrans_kernels import backends


def formula(operator: str, backend: str, what: str) -> Callable[..., Any]:
    """The reference's formula of `operator`, for PyTorch to differentiate as it likes.

    Raises NotImplementedError, which says what is missing, where another backend than the reference is asked for.
    """
    if backends.named(operator, backend) != "reference":
        raise NotImplementedError(f"{operator} has {what} with backend='reference' alone, got backend={backend!r}")
    return backends.formula(operator)


def second(operator: str, backend: str, gradients: Callable[[], Sequence[Tensor]], *tensors: Tensor) -> Any:
    """First derivatives, which depend on `tensors`, in a graph that says what is missing when differentiated."""
    return _Once.apply(operator, backend, gradients, *tensors)


def through_formula(
    function: Callable[[Sequence[Tensor]], Sequence[Tensor]], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of `inputs` in a graph of their own: what `function` of them gives, differentiated by PyTorch."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    pairs = [(result, grad) for result, grad in zip(function(inputs), grads, strict=True) if result.requires_grad]
    results, grads = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(results, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if tensor.requires_grad else None for tensor in inputs]


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, operator: str, backend: str, gradients: Callable[[], Sequence[Tensor]], *tensors: Tensor
    ) -> Any:
        ctx.operator, ctx.backend = operator, backend
        return gradients()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        formula(ctx.operator, ctx.backend, "second derivatives")
