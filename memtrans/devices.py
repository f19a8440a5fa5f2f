"""Devices by their names."""

from __future__ import annotations

import torch


def usable_device(device: torch.device | str | int) -> torch.device:
    """The device of that name. Raises ValueError when this torch cannot use it, or when it keeps no values (meta)."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one that this torch can use, got {device!r}: {reason}") from error
    if found.type == "meta":
        raise ValueError(f"device must be one that keeps values, got {device!r}")
    return found
