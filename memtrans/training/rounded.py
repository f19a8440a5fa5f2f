"""Weights of linear layers in the dtype of matrix products, rounded once a step instead of once a segment.

Under autocast alone each segment rounds each weight by a launch of its own, and each gradient is cast back by one and
added by another: a quarter of what an eager step launches. A compiler adds gradients one by one, too. Here all weights
are rounded by one launch, and all gradients of a backward pass cast by one and added by one or two. The numbers are the
same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from memtrans.layers import is_bare


class RoundedWeights:
    """What a model reads during a step in place of the float32 weights of layers that are exactly `nn.Linear`.

    A weight that another kind of layer holds too, such as an embedding, that has a hook, or whose layer has one, stays.
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
        self.dtype = dtype
        linear = [module for module in model.modules() if type(module) is nn.Linear and is_bare(module)]
        self._linear = [module._parameters for module in linear]
        self._left = _held_by_others(model, linear)
        # one for each parameter of the model: its own, what is read in its place, and the gradients collected so far
        self._own = list(model.parameters())
        self._read: list[nn.Parameter] = []
        self._sums: list[Any] = []  # None where there was no gradient yet

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Has the layers read the weights as they are now, rounded; afterwards the own ones have what was collected."""
        places = [
            (parameters, name, weight)
            for parameters in self._linear
            for name, weight in parameters.items()
            if weight is not None and weight.dtype == torch.float32
            if id(weight) not in self._left and not _is_watched(weight)
        ]
        weights = [weight for _, _, weight in places]
        rounded = dict(zip(map(id, weights), _rounded(weights, self.dtype), strict=True))
        self._read = [rounded.get(id(own), own) for own in self._own]
        self._sums = [None] * len(self._own)
        try:
            for parameters, name, weight in places:
                parameters[name] = rounded[id(weight)]
            yield
        finally:
            for parameters, name, weight in places:
                parameters[name] = weight
        for own, total in zip(self._own, self._sums, strict=True):
            own.grad = total

    @torch.no_grad()
    def collect(self) -> None:
        """Takes the gradients of a backward pass, and adds them to those of the passes before it."""
        found: list[Any] = [read.grad for read in self._read]
        for read in self._read:
            read.grad = None
        rounded = [place for place, own in enumerate(self._own) if self._read[place] is not own]
        narrow = [place for place in rounded if found[place] is not None]
        wide = [torch.empty_like(self._own[place]) for place in narrow]
        if narrow:
            torch._foreach_copy_(wide, [found[place] for place in narrow])
        for place, grad in zip(narrow, wide, strict=True):
            found[place] = grad
        again = [place for place, total in enumerate(self._sums) if total is not None and found[place] is not None]
        if again:
            torch._foreach_add_([self._sums[place] for place in again], [found[place] for place in again])
        self._sums = [grad if total is None else total for total, grad in zip(self._sums, found, strict=True)]


def _held_by_others(model: nn.Module, linear: Sequence[nn.Module]) -> set[int]:
    """The ids of the parameters that modules beside these hold, which read them as they are."""
    among = set(map(id, linear))
    others = [module for module in model.modules() if id(module) not in among]
    return {id(parameter) for module in others for parameter in module.parameters(recurse=False)}


def _is_watched(weight: nn.Parameter) -> bool:
    """Whether a hook waits for the weight's gradient: it would not see that of what is read in its place."""
    return bool(weight._backward_hooks or weight._post_accumulate_grad_hooks)


@torch.no_grad()
def _rounded(weights: Sequence[nn.Parameter], dtype: torch.dtype) -> list[nn.Parameter]:
    """The weights in another dtype, each by itself in a graph."""
    numbers = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    if numbers:
        torch._foreach_copy_(numbers, list(weights))
    return [nn.Parameter(number, weight.requires_grad) for number, weight in zip(numbers, weights, strict=True)]
