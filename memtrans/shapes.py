"""Modules of which nobody wants the numbers: how many there are, of which shapes, or what a file will bring."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _NothingDrawn(TorchFunctionMode):
    """Functions of `torch.nn.init` leave tensors of shapes alone as they are: PyTorch would import its compiler."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if getattr(function, "__module__", None) == nn.init.__name__:
            tensor: Tensor = args[0] if args else named["tensor"]
            if tensor.is_meta:
                return tensor
        return function(*args, **named)


@contextmanager
def shapes_alone() -> Iterator[None]:
    """What is made inside has shapes and no numbers: nothing is allocated, nothing drawn.

    >>> with shapes_alone():
    ...     layer = nn.Linear(1_000_000, 1_000_000)
    >>> layer.weight.device, layer.weight.numel()
    (device(type='meta'), 1000000000000)
    """
    with torch.device("meta"), _NothingDrawn():
        yield
