"""What a run has learned, as a checkpoint holds it: weights and the optimiser's moments, each under its full name.

Of a model that FSDP shards every rank has to ask for them; they are gathered, and the first rank alone gets them. To
load them every rank has to give the same ones, whole, and gets its shards of the first rank's.

A moment is named after its parameter: `token_emb.weight.exp_avg`. Earlier checkpoints say the parameter's place in the
optimiser instead, `3.exp_avg`, and load as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from memtrans.distributed.dtensors import is_sharded
from memtrans.training.checkpoint import Checkpoint
from memtrans.training.model import build_model
from memtrans.training.optimizer import state_shapes
from memtrans.training.settings import Settings


def _options(model: nn.Module) -> StateDictOptions:
    """Whole tensors on the CPU, of a sharded model; tensors as they are, of any other."""
    sharded = any(is_sharded(parameter) for parameter in model.parameters())
    return StateDictOptions(full_state_dict=sharded, cpu_offload=sharded, strict=False)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights by name."""
    weights: dict[str, Any] = get_model_state_dict(model, options=_options(model))
    return weights


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copies a checkpoint's weights into a model. Raises ValueError when they are another model's."""
    saved = checkpoint.parts.get("model", {})
    _check_weights(model, saved)
    # in one order on every rank: a file gives them in any, and ranks exchange the shards of one at a time
    set_model_state_dict(model, {name: saved[name] for name in sorted(saved)}, options=_options(model))


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
        with torch.device("meta"):
            model = build_model(settings)
    except (TypeError, RuntimeError) as error:  # sizes beyond any tensor's
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(f"checkpoint must hold weights of this model, got others: {reason}") from error
    _check_weights(model, saved)


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments of a model's optimiser by name; none before its first step."""
    if not optimizer.state:
        return {}  # PyTorch would take a step to make some
    state = get_optimizer_state_dict(model, optimizer, options=_options(model))
    moments: dict[str, dict[str, Tensor]] = state.get("state", {})  # type: ignore[assignment]
    return {f"{name}.{key}": tensor for name, tensors in moments.items() for key, tensor in tensors.items()}


def load_moments(model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]) -> None:
    """Copies a checkpoint's moments into an optimiser. Raises ValueError when they are another one's."""
    groups = _named_groups(model, optimizer)
    labels = _labels(groups, saved)
    _check_moments(optimizer, {label: model.get_parameter(name) for label, name in labels.items()}, saved)
    if not saved:
        return
    state: dict[str, Any] = {}
    for name in sorted(saved):  # see `load_weights`
        label, _, key = name.rpartition(".")
        state.setdefault(labels[label], {})[key] = saved[name]
    whole: dict[str, Any] = {"state": state, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, whole, options=_options(model))


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
