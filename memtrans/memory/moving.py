"""Another device or dtype for what a memory holds, by the names that modules have for it."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

Moved = TypeVar("Moved", bound="Movable")


class Movable:
    """Gives `cuda`, `cpu`, `half`, `bfloat16`, `float` and `double` to what has a `to`."""

    def to(self: Moved, *args: Any, **kwargs: Any) -> Moved:
        """Moves and casts in place; returns itself."""
        raise NotImplementedError

    def cuda(self: Moved, device: torch.device | int | str | None = None) -> Moved:
        """Moves to a GPU, the current one by default; see `to`."""
        if device is None:
            return self.to(torch.device("cuda", torch.cuda.current_device()))
        return self.to(torch.device("cuda", device) if isinstance(device, int) else torch.device(device))

    def cpu(self: Moved) -> Moved:
        """Moves to the CPU; see `to`."""
        return self.to(torch.device("cpu"))

    def half(self: Moved) -> Moved:
        """Stores keys and values as float16; see `to`."""
        return self.to(torch.float16)

    def bfloat16(self: Moved) -> Moved:
        """Stores keys and values as bfloat16; see `to`."""
        return self.to(torch.bfloat16)

    def float(self: Moved) -> Moved:
        """Stores keys and values as float32; see `to`."""
        return self.to(torch.float32)

    def double(self: Moved) -> Moved:
        """Stores keys and values as float64; see `to`."""
        return self.to(torch.float64)


def device_and_dtype(*args: Any, **kwargs: Any) -> tuple[torch.device | None, torch.dtype | None]:
    """What `to` was asked for, in any of the forms that `torch.nn.Module.to` takes.

    >>> device_and_dtype("cpu", dtype=torch.float16)
    (device(type='cpu'), torch.float16)
    """
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    return device, dtype
