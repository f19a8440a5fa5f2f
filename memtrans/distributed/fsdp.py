"""PyTorch's FSDP2 (`fully_shard`): each rank keeps a shard of every weight, its gradient and its optimiser state.

A layer's weights are gathered when it runs and freed afterwards. They are DTensors. For checkpoints, which do not
depend on the number of ranks, weights and moments are gathered whole and by name: every rank has to ask for them, and
the first one alone gets them. To load them every rank gives the same ones, and gets its shards of the first rank's.

What this needs of PyTorch takes as long to import as the rest of `memtrans`: it is imported where a model is sharded.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from memtrans.distributed.ranks import Ranks

if TYPE_CHECKING:
    from memtrans.transformer import MemorizingTransformer

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)  # tensors, on the CPU


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


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Weights by name."""
    weights: dict[str, Any] = get_model_state_dict(model, options=WHOLE)
    return weights


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Takes up what `weights_of` returned, in one order on all ranks, which exchange the shards of one at a time."""
    set_model_state_dict(model, {name: weights[name] for name in sorted(weights)}, options=WHOLE)


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Moments by the names of their parameters and their own."""
    state = get_optimizer_state_dict(model, optimizer, options=WHOLE)
    moments: dict[str, dict[str, Tensor]] = state.get("state", {})  # type: ignore[assignment]
    return moments


def load_moments(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    moments: Mapping[str, Mapping[str, Tensor]],
    groups: list[dict[str, Any]],
) -> None:
    """Takes up what `moments_of` returned. groups: the optimiser's options, with names in the place of parameters."""
    in_order = {name: dict(sorted(moments[name].items())) for name in sorted(moments)}  # see `load_weights`
    whole: dict[str, Any] = {"state": in_order, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, whole, options=WHOLE)
