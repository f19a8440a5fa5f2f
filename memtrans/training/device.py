"""The device that a process computes on."""

from __future__ import annotations

import torch

from memtrans.devices import usable_device
from memtrans.distributed.ranks import ALONE, Ranks


def pick_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """The device of that name, a GPU with its number; `auto` takes one where there is one.

    Of several ranks on a host each takes a GPU of its own, in their order. Raises ValueError when it cannot be used.
    """
    device = usable_device(name) if name != "auto" else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if device.type == "cpu":
        return device
    if ranks.size == 1:
        return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
    if ":" in name:
        raise ValueError(f"device must be auto, cpu or cuda with {ranks.size} ranks, each on its own, got {name!r}")
    if ranks.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"device must have a GPU for each rank, got {torch.cuda.device_count()} for rank {ranks.local_rank} "
            "of this host"
        )
    return torch.device("cuda", ranks.local_rank)
