"""Weights of linear layers in the dtype of matrix products, rounded once a step instead of once a segment.

Under autocast alone each segment rounds each weight by a launch of its own, and each gradient is cast back by one and
added by another: a quarter of what an eager step launches. Here all weights are rounded by one launch, and all
gradients of a backward pass cast by one and added by one or two. The numbers are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class RoundedWeights:
    """What a model reads during a step in place of the float32 weights of layers that are exactly `nn.Linear`.

    Each backward pass may be of one forward pass: the gradients of two would be added before they are cast.

    Args:
        model: on its device.
        dtype: of matrix products.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> weights = RoundedWeights(model, torch.bfloat16)
    >>> with weights.reading():
    ...     for _ in range(2):
    ...         model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    ...         weights.collect()
    >>> model.weight.dtype, model.weight.grad
    (torch.float32, tensor([[2.]]))
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self._read: dict[nn.Parameter, nn.Parameter] = {}  # by the model's own, which may be what is read
        self._sums: dict[nn.Parameter, Tensor] = {}

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Has the layers read the weights as they are now, rounded; afterwards the own ones have what was collected."""
        linear = [module._parameters for module in self.model.modules() if type(module) is nn.Linear]
        places = [
            (parameters, name, weight)
            for parameters in linear
            for name, weight in parameters.items()
            if weight is not None and weight.dtype == torch.float32
        ]
        own = [weight for _, _, weight in places]
        self._read = {weight: weight for weight in self.model.parameters()}
        self._read |= dict(zip(own, _rounded(own, self.dtype), strict=True))
        self._sums = {}
        try:
            for parameters, name, weight in places:
                parameters[name] = self._read[weight]
            yield
        finally:
            for parameters, name, weight in places:
                parameters[name] = weight
        for weight, total in self._sums.items():
            weight.grad = total

    @torch.no_grad()
    def collect(self) -> None:
        """Takes the gradients of a backward pass, and adds them to those of the passes before it."""
        found = {own: read.grad for own, read in self._read.items() if read.grad is not None}
        for read in self._read.values():
            read.grad = None
        narrow = [own for own, grad in found.items() if grad.dtype != own.dtype]
        wide = [torch.empty_like(own) for own in narrow]
        if narrow:
            torch._foreach_copy_(wide, [found[own] for own in narrow])
        found |= zip(narrow, wide, strict=True)
        again = [own for own in found if own in self._sums]
        if again:
            torch._foreach_add_([self._sums[own] for own in again], [found[own] for own in again])
        self._sums = {**found, **self._sums}


@torch.no_grad()
def _rounded(weights: Sequence[nn.Parameter], dtype: torch.dtype) -> list[nn.Parameter]:
    """The weights in another dtype, each by itself in a graph."""
    numbers = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    if numbers:
        torch._foreach_copy_(numbers, list(weights))
    return [nn.Parameter(number, weight.requires_grad) for number, weight in zip(numbers, weights, strict=True)]
