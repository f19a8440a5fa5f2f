"""PyTorch's FSDP2 (`fully_shard`): each rank keeps a shard of every weight, its gradient and its optimiser state.

A layer's weights are gathered when it runs and freed afterwards. They are DTensors; `training.state` gathers them for
checkpoints, which therefore do not depend on the number of ranks.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from memtrans.distributed.ranks import Ranks

if TYPE_CHECKING:
    from memtrans.transformer import MemorizingTransformer


def shard(model: MemorizingTransformer, ranks: Ranks, device: torch.device) -> None:
    """Shards a model over all ranks, layer by layer. Gradients become sums over the ranks, not means."""
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
