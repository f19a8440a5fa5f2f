"""Weights and moments come back as they were, also from earlier checkpoints; those of another model are refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from memtrans import MemorizingTransformer
from memtrans.training.checkpoint import Checkpoint
from memtrans.training.model import build_model
from memtrans.training.optimizer import make_optimizer
from memtrans.training.settings import Settings
from memtrans.training.state import load_moments, load_weights, moments_of, weights_of

SMALL = Settings(layers=2, width=16, heads=2, head_width=8, memory=64)


def trained(settings: Settings, steps: int = 2) -> tuple[MemorizingTransformer, torch.optim.Optimizer]:
    """A model and its optimiser after so many steps."""
    torch.manual_seed(0)
    model = build_model(settings)
    optimizer = make_optimizer(model, settings)
    tokens = torch.randint(0, 256, (2, 8))
    for _ in range(steps):
        model(tokens, model.create_knn_memories(batch_size=2), labels=tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_weights_come_back_and_those_of_another_model_are_refused() -> None:
    saved = Checkpoint({"model": weights_of(trained(SMALL)[0])}, {})
    fresh = build_model(SMALL)
    load_weights(fresh, saved)
    assert all(torch.equal(tensor, saved.parts["model"][name]) for name, tensor in fresh.state_dict().items())
    with pytest.raises(ValueError, match="checkpoint must hold weights of this model, got others"):
        load_weights(build_model(dataclasses.replace(SMALL, width=24)), saved)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_moments_come_back_by_the_names_of_their_parameters(optimizer: str) -> None:
    settings = dataclasses.replace(SMALL, optimizer=optimizer)
    saved = moments_of(*trained(settings))
    assert "token_emb.weight.step" in saved
    model, fresh = trained(settings, steps=0)
    weights = {name: tensor.clone() for name, tensor in weights_of(model).items()}
    assert moments_of(model, fresh) == {}
    load_moments(model, fresh, saved)
    found = moments_of(model, fresh)
    assert set(found) == set(saved)
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in weights_of(model).items())


def test_moments_named_by_the_places_of_their_parameters_come_back_too() -> None:
    """As checkpoints had them before; places count through the optimiser's groups."""
    model, optimizer = trained(SMALL)
    saved = moments_of(model, optimizer)
    names = {parameter: name for name, parameter in model.named_parameters()}
    places = {
        names[weight]: place for place, weight in enumerate(w for g in optimizer.param_groups for w in g["params"])
    }
    former = {}
    for name, tensor in saved.items():
        parameter, _, key = name.rpartition(".")
        former[f"{places[parameter]}.{key}"] = tensor
    fresh_model, fresh = trained(SMALL, steps=0)
    load_moments(fresh_model, fresh, former)
    found = moments_of(fresh_model, fresh)
    assert set(found) == set(saved)
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize("names", [("adamw", "adafactor"), ("adamw", "muon"), ("muon", "adamw")])
def test_the_moments_of_another_optimiser_are_refused(names: tuple[str, str]) -> None:
    wrote, reads = (dataclasses.replace(SMALL, optimizer=name) for name in names)
    saved = moments_of(*trained(wrote))
    model, other = trained(reads, steps=0)
    with pytest.raises(ValueError, match=r"this model's moments, \S+ of shape .* got"):
        load_moments(model, other, saved)
    assert moments_of(model, other) == {}
