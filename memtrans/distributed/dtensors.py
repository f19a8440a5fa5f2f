"""DTensors, of which each rank holds a shard: FSDP2 (`fully_shard`) makes them of a model's weights.

They are told by their method `full_tensor`: a PyTorch without `torch.distributed` lacks their class.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from memtrans.distributed.ranks import ALONE, Ranks, ranks_of


def is_sharded(tensor: Any) -> bool:
    """Whether each rank holds a shard of the tensor."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Any) -> Tensor:
    """The whole tensor. Every rank has to call this for a sharded one."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def holders_of(tensors: Iterable[Tensor]) -> Ranks:
    """The ranks that hold shards of the tensors, which are all sharded in one way; ALONE where none is sharded."""
    sharded: Any = next((tensor for tensor in tensors if is_sharded(tensor)), None)
    if sharded is None:
        return ALONE
    mesh, world = sharded.device_mesh, dist.group.WORLD
    assert world is not None
    return ranks_of(mesh.get_group() if mesh.ndim == 1 else world)  # spread and copied, as HSDP does, it is over all


def check_whole(name: str, tensors: Iterable[Tensor]) -> None:
    """Raises ValueError for a sharded tensor, where each rank needs the whole one."""
    if any(is_sharded(tensor) for tensor in tensors):
        raise ValueError(
            f"{name} must have all of its weights on this rank, got one that fully_shard has spread: call its "
            "save_pretrained on every rank, and take what from_pretrained loads"
        )
