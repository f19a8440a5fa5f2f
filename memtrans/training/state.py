"""What a run has learned, as a checkpoint holds it: weights and the optimiser's moments, each under its full name.

Of a model that FSDP shards every rank has to ask for them and to load them, see `distributed.fsdp`.

A moment is named after its parameter: `token_emb.weight.exp_avg`. Earlier checkpoints say the parameter's place in the
optimiser instead, `3.exp_avg`, and load as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from memtrans.distributed.dtensors import is_sharded
from memtrans.shapes import shapes_alone
from memtrans.training.checkpoint import Checkpoint
from memtrans.training.model import build_model
from memtrans.training.optimizer import state_shapes
from memtrans.training.settings import Settings


def _of_shards(model: nn.Module) -> ModuleType | None:
    """What gathers and spreads the weights and moments of a sharded model; None for one that is whole."""
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        return None
    from memtrans.distributed import fsdp  # what it needs of PyTorch takes a second to import

    return fsdp


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights by name."""
    if of_shards := _of_shards(model):
        return dict(of_shards.weights_of(model))
    return dict(model.state_dict())


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copies a checkpoint's weights into a model. Raises ValueError when they are another model's."""
    saved = checkpoint.parts.get("model", {})
    _check_weights(model, saved)
    if of_shards := _of_shards(model):
        of_shards.load_weights(model, saved)
    else:
        model.load_state_dict(saved)


def _check_weights(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = _difference(saved, expected)
    if wrong is not None:
        raise ValueError(f"checkpoint must hold weights of this model, got others: {wrong}")


def check_settings(settings: Settings, checkpoint: Checkpoint) -> None:
    """Raises ValueError when a checkpoint's settings ask for another model than its weights are.

    Nothing is allocated for it: settings may ask for more than a machine has.
    """
    saved = checkpoint.parts.get("model", {})
    if settings.layers > len(saved):
        raise ValueError(
            f"checkpoint must hold weights of this model, got others: {len(saved)} tensors for {settings.layers} layers"
        )
    try:
        with shapes_alone():
            model = build_model(settings)
    except (TypeError, RuntimeError) as error:  # sizes beyond any tensor's
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(f"checkpoint must hold weights of this model, got others: {reason}") from error
    _check_weights(model, saved)


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments of a model's optimiser by name; none before its first step."""
    if not optimizer.state:
        return {}  # PyTorch would take a step to make some
    if of_shards := _of_shards(model):
        moments = of_shards.moments_of(model, optimizer)
    else:
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        moments = {names[parameter]: of_one for parameter, of_one in optimizer.state.items()}
    return {f"{name}.{key}": tensor for name, of_one in moments.items() for key, tensor in of_one.items()}


def load_moments(model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]) -> None:
    """Copies a checkpoint's moments into an optimiser. Raises ValueError when they are another one's."""
    groups = _named_groups(model, optimizer)
    labels = _labels(groups, saved)
    _check_moments(optimizer, {label: model.get_parameter(name) for label, name in labels.items()}, saved)
    if not saved:
        return
    moments: dict[str, dict[str, Tensor]] = {}
    for name, tensor in saved.items():
        label, _, key = name.rpartition(".")
        moments.setdefault(labels[label], {})[key] = tensor
    if of_shards := _of_shards(model):
        of_shards.load_moments(model, optimizer, moments, groups)
    else:
        _load_whole_moments(optimizer, moments, groups)


def _load_whole_moments(
    optimizer: torch.optim.Optimizer, moments: Mapping[str, Mapping[str, Tensor]], groups: list[dict[str, Any]]
) -> None:
    """PyTorch's optimisers know parameters by their places."""
    places = {name: place for place, name in enumerate(name for group in groups for name in group["params"])}
    by_place = [{**group, "params": [places[name] for name in group["params"]]} for group in groups]
    state = {places[name]: dict(of_one) for name, of_one in moments.items()}
    optimizer.load_state_dict({"state": state, "param_groups": by_place})


def _named_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The optimiser's options as they are, with names in the place of parameters."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [{**group, "params": [names[weight] for weight in group["params"]]} for group in optimizer.param_groups]


def _labels(groups: list[dict[str, Any]], saved: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of the parameters by what stands for them in a checkpoint: the names themselves, or places."""
    names = [name for group in groups for name in group["params"]]
    by_place = {str(place): name for place, name in enumerate(names)}
    return by_place if any(name.rpartition(".")[0] in by_place for name in saved) else {name: name for name in names}


def _check_moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]
) -> None:
    """Refuses what are no moments of this optimiser: it takes any. A parameter without a gradient has none."""
    with_moments = {name.rpartition(".")[0] for name in saved}
    expected = {
        f"{label}.{key}": shape
        for label, parameter in parameters.items()
        for key, shape in state_shapes(optimizer, parameter).items()
        if label in with_moments
    }
    wrong = _difference(saved, expected)
    if wrong is not None:
        raise ValueError(f"checkpoint must hold this model's moments, {wrong}")


def _difference(saved: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> str | None:
    """The first name that is missing, too much or of another shape; None where there is none."""
    found = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    wrong = min((name for name, _ in found.items() ^ expected.items()), default=None)
    return None if wrong is None else f"{wrong} of shape {expected.get(wrong)}, got {found.get(wrong)}"
