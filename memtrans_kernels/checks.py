"""Checks of the public boundary: each error names the argument, its value and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor


class Letters:
    """Binds the legend's shape letters to sizes, argument by argument, and refuses a size that disagrees.

    >>> import torch
    >>> letters = Letters()
    >>> letters.bind("query", torch.zeros(2, 3), "N D")
    >>> letters["D"]
    3
    >>> letters.bind("key", torch.zeros(5, 4), "L D")
    Traceback (most recent call last):
        ...
    ValueError: key must have shape (L, D) with D=3, got (5, 4)
    """

    def __init__(self, **sizes: int) -> None:
        self.sizes = dict(sizes)

    def __getitem__(self, letter: str) -> int:
        return self.sizes[letter]

    def bind(self, name: str, tensor: Tensor, axes: str) -> None:
        """Binds the axes of `tensor`, named by different letters such as "B H N D", or raises ValueError."""
        letters = axes.split()
        sizes = dict(zip(letters, tensor.shape, strict=False))
        if tensor.dim() != len(letters) or any(self.sizes.get(letter, size) != size for letter, size in sizes.items()):
            known = ", ".join(f"{letter}={self.sizes[letter]}" for letter in letters if letter in self.sizes)
            expected = f"({', '.join(letters)})" + (f" with {known}" if known else "")
            raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")
        self.sizes.update(sizes)


def floating(**tensors: Tensor | None) -> None:
    """Refuses tensors that do not hold floating-point numbers."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


def typed(dtype: torch.dtype, **tensors: Tensor | None) -> None:
    """Refuses tensors of another dtype than `dtype`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")


def same_device(device: torch.device, **tensors: Tensor | None) -> None:
    """Refuses tensors that live on another device than `device`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on {device} like the other tensors, got {tensor.device}")


def within(name: str, tensor: Tensor | None, low: int, high: int) -> None:
    """Refuses numbers outside [low, high], on the CPU alone: on a GPU looking at a value is a host round trip."""
    if tensor is None or tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if bool(((tensor < low) | (tensor > high)).any()):
        raise ValueError(f"{name} must be in [{low}, {high}], got {tensor.tolist()}")


def divides(divisor: int, divisor_name: str, number: int, number_name: str) -> None:
    """Refuses a `number` that is no positive multiple of `divisor`."""
    if divisor <= 0 or number % divisor:
        raise ValueError(f"{number_name} must be a multiple of {divisor_name}={divisor}, got {number}")
