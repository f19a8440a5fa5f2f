"""What moves the weights of a run, and how fast in each step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from memtrans.distributed.dtensors import is_sharded
from memtrans.training import adafactor, muon
from memtrans.training.adafactor import Adafactor
from memtrans.training.muon import Muon
from memtrans.training.settings import Settings
from memtrans.transformer import MemorizingTransformer

# What makes a memory's own query starts at nothing when all else has learned, at the end of a schedule: at the rate of
# the rest it would get nowhere in the steps that are left.
OWN_QUERY, OWN_RATE = (".memory_mix", ".memory_sharpness"), 10.0


def make_optimizer(model: MemorizingTransformer, settings: Settings) -> torch.optim.Optimizer:
    """The optimiser of a run, with weight decay on matrices of linear layers alone.

    All kinds can be captured, read the learning rate from the device on a GPU, and leave a step out where their
    attribute `found_inf` is 1. Muon moves the matrices inside the model's layers; embeddings, the linear layer of the
    logits, tables and vectors are AdamW's. A group's rate is the run's times its `rate_factor`, where it has one: that
    of what makes a memory's own query is 10.
    """
    own = [p for name, p in model.named_parameters() if name.endswith(OWN_QUERY)]
    parameters = [p for name, p in model.named_parameters() if not name.endswith(OWN_QUERY)]
    decayed = _matrices(model)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    on_gpu = parameters[0].is_cuda and not is_sharded(parameters[0])  # no graph captures sharded ones
    rate: Tensor | float = settings.learning_rate
    if on_gpu:
        rate = torch.tensor(rate, dtype=torch.float32, device=parameters[0].device)
    if own:  # a number of its own where it lies on the device
        groups.append({"params": own, "weight_decay": 0.0, "lr": OWN_RATE * rate, "rate_factor": OWN_RATE})
    if settings.optimizer == "adafactor":
        return Adafactor(groups, lr=rate)
    if settings.optimizer == "muon":
        hidden = _matrices(model.layers)
        matrices = [p for p in groups[0]["params"] if id(p) in hidden]
        groups[0]["params"] = [p for p in groups[0]["params"] if id(p) not in hidden]
        others = [{**group, "orthogonal": False} for group in groups]
        return Muon([{"params": matrices, "weight_decay": settings.weight_decay}, *others], lr=rate)
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True, capturable=on_gpu)


def _matrices(module: nn.Module) -> set[int]:
    """The ids of the matrices of linear layers in a module."""
    linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return {id(p) for layer in linear for p in layer.parameters(recurse=False) if p.dim() == 2}


def state_shapes(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, tuple[int, ...]]:
    """What an optimiser of `make_optimizer` keeps for a weight, by name."""
    if isinstance(optimizer, Adafactor):
        return {name: tuple(tensor.shape) for name, tensor in adafactor.initial_state(weight).items()}
    if isinstance(optimizer, Muon):
        state = muon.initial_state(weight, optimizer.moves_orthogonally(weight))
        return {name: tuple(tensor.shape) for name, tensor in state.items()}
    return {"step": (), "exp_avg": tuple(weight.shape), "exp_avg_sq": tuple(weight.shape)}


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of an optimiser of `make_optimizer`, in place where it lives on the device."""
    for group in optimizer.param_groups:
        of_group = rate * group.get("rate_factor", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(of_group)
        else:
            group["lr"] = of_group


def learning_rate(settings: Settings, step: int) -> float:
    """Of the optimiser step after `step` others: a linear warm-up, then a decay.

    A cosine ends at `final_rate` of the highest rate. The inverse square root of the number of the step, constant
    during the warm-up but for its ramp, is the paper's: highest at the warm-up's end, `learning_rate` / sqrt(`warmup`).

    >>> settings = Settings(steps=100, warmup=10, learning_rate=1.0, final_rate=0.0)
    >>> [round(learning_rate(settings, step), 2) for step in (0, 9, 10, 55, 99)]
    [0.1, 1.0, 1.0, 0.5, 0.0]
    >>> settings = Settings(schedule="inverse-sqrt", warmup=100, learning_rate=1.0)
    >>> [round(learning_rate(settings, step), 3) for step in (0, 49, 99, 399)]
    [0.001, 0.05, 0.1, 0.05]
    """
    highest = settings.learning_rate
    if settings.schedule == "inverse-sqrt":
        highest /= math.sqrt(max(step + 1, settings.warmup))
    if step < settings.warmup:
        return highest * (step + 1) / settings.warmup
    if settings.schedule == "inverse-sqrt":
        return highest
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    share = settings.final_rate + (1 - settings.final_rate) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return highest * share
