"""Tensors of which each rank holds a part: DTensors, which FSDP2 (`fully_shard`) makes of a model's weights.

They are known by what they can do: PyTorch has no class of them where it was built without `torch.distributed`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from memtrans.distributed.ranks import ALONE, Ranks, ranks_of


def is_sharded(tensor: Any) -> bool:
    """Whether each rank holds a part of it."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Any) -> Tensor:
    """The tensor itself, or all parts of one that is spread; then every rank has to ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def holders_of(tensors: Iterable[Tensor]) -> Ranks:
    """The ranks over which tensors are spread, all of them in one way; ALONE where none is."""
    spread: Any = next((tensor for tensor in tensors if is_sharded(tensor)), None)
    if spread is None:
        return ALONE
    mesh, world = spread.device_mesh, dist.group.WORLD
    assert world is not None
    return ranks_of(mesh.get_group() if mesh.ndim == 1 else world)  # spread and copied, as HSDP does, it is over all


def check_whole(name: str, tensors: Iterable[Tensor]) -> None:
    """Refuses tensors that are spread where each rank needs all of them."""
    if any(is_sharded(tensor) for tensor in tensors):
        raise ValueError(
            f"{name} must have all of its weights on this rank, got one that fully_shard has spread: call its "
            "save_pretrained on every rank, and take what from_pretrained loads"
        )
