"""Weights and moments of a model that FSDP2 has spread over ranks, whole and by name, as PyTorch gathers and spreads.

Every rank has to ask for them, and the first one alone gets them. To load them every rank gives the same ones, and gets
its shards of the first rank's.

What PyTorch has for it is imported where it is used: that takes as long as importing the rest of `memtrans`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.checkpoint.state_dict import StateDictOptions


def _options() -> StateDictOptions:
    """Whole tensors, on the CPU."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Weights by name."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    weights: dict[str, Any] = get_model_state_dict(model, options=_options())
    return weights


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Takes up what `weights_of` returned, in one order on all ranks, which exchange the shards of one at a time."""
    from torch.distributed.checkpoint.state_dict import set_model_state_dict

    set_model_state_dict(model, {name: weights[name] for name in sorted(weights)}, options=_options())


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Moments by the names of their parameters and their own."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    state = get_optimizer_state_dict(model, optimizer, options=_options())
    moments: dict[str, dict[str, Tensor]] = state.get("state", {})  # type: ignore[assignment]
    return moments


def load_moments(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    moments: Mapping[str, Mapping[str, Tensor]],
    groups: list[dict[str, Any]],
) -> None:
    """Takes up what `moments_of` returned. groups: the optimiser's options, with names in the place of parameters."""
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    in_order = {name: dict(sorted(moments[name].items())) for name in sorted(moments)}  # see `load_weights`
    whole: dict[str, Any] = {"state": in_order, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, whole, options=_options())
