"""What a run has learned, as a checkpoint holds it: weights and the optimiser's moments, whole whatever is spread.

A moment is named after its parameter's place in the optimiser and its own name: `3.exp_avg`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from memtrans.distributed.dtensors import gathered
from memtrans.distributed.fsdp import part_of
from memtrans.training.checkpoint import Checkpoint
from memtrans.training.step import state_shapes
from memtrans.transformer import MemorizingTransformer


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights; of one that is spread every rank has to ask for them."""
    return {name: gathered(tensor) for name, tensor in model.state_dict().items()}


def load_weights(model: MemorizingTransformer, checkpoint: Checkpoint) -> None:
    """Copies a checkpoint's weights into a model. Raises ValueError when they are another model's."""
    try:
        here, saved = model.state_dict(), dict(checkpoint.parts["model"])
        model.load_state_dict({n: part_of(tensor, here[n]) if n in here else tensor for n, tensor in saved.items()})
    except (KeyError, RuntimeError) as error:
        detail = " ".join(str(error).split())
        raise ValueError(f"checkpoint must hold weights of this model, got others: {detail}") from error


def moments_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's moments; of a model that is spread every rank has to ask for them.

    In one order: all ranks must gather the same one at a time, and those of a file come in any.
    """
    return {
        f"{place}.{name}": gathered(tensors[name])
        for place, tensors in sorted(optimizer.state_dict()["state"].items())
        for name in sorted(tensors)
    }


def load_moments(optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]) -> None:
    """Copies a checkpoint's moments into an optimiser. Raises ValueError when they are another one's."""
    _check_moments(optimizer, saved)
    parameters = _parameters_of(optimizer)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in saved.items():
        place, key = name.split(".", 1)
        moment = part_of(tensor, parameters[int(place)]) if tensor.dim() else tensor
        moments.setdefault(int(place), {})[key] = moment
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """In the optimiser's order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _check_moments(optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]) -> None:
    """Refuses what are no moments of this optimiser: it takes any. A parameter without a gradient has none."""
    parameters = _parameters_of(optimizer)
    places = {name.partition(".")[0] for name in saved}
    expected = {
        f"{place}.{name}": shape
        for place, parameter in enumerate(parameters)
        for name, shape in state_shapes(optimizer, parameter).items()
        if str(place) in places
    }
    found = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if found != expected:
        wrong = sorted(set(found.items()) ^ set(expected.items()))[0][0]
        raise ValueError(
            f"checkpoint must hold this model's moments, {wrong} of shape {expected.get(wrong)}, got {found.get(wrong)}"
        )
