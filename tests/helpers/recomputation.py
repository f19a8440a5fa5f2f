"""What activation checkpointing does: something runs again while a backward pass runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def in_backward(function: Callable[[], Result]) -> Result:
    """What the function returns when it is called in a backward pass."""
    results: list[Result] = []
    leaf = torch.ones(1, requires_grad=True)
    out = leaf * 1.0
    out.register_hook(lambda _: results.append(function()))
    out.backward()
    return results[0]
