"""A model whose weights, gradients and optimiser state are spread over the ranks: PyTorch's FSDP2 (`fully_shard`).

Each layer is gathered when it runs and let go afterwards. Its parameters are DTensors then; what is saved is whole, so
that a checkpoint does not depend on how its model was spread.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from memtrans.distributed.ranks import Ranks

if TYPE_CHECKING:
    from memtrans.transformer import MemorizingTransformer


def spread(model: MemorizingTransformer, ranks: Ranks, device: torch.device) -> None:
    """Spreads a model over all ranks, a layer at a time; gradients are sums over ranks, not means."""
    # logits are a view, as those of every linear layer; nothing writes into them
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (ranks.size,))
    for layer in model.layers:
        assert isinstance(layer, nn.ModuleList)
        fully_shard(list(layer), mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other way to a factor of 1


def part_of(tensor: Tensor, like: Tensor) -> Any:
    """What this rank holds of a whole tensor that is to be spread like another one; itself where that is not spread."""
    if not isinstance(like, DTensor):
        return tensor
    moved = tensor.to(like.device)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)
