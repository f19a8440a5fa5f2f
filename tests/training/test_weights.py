"""Weights and moments come back as they were, and those of another model or optimiser are refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from memtrans import MemorizingTransformer
from memtrans.training.checkpoint import Checkpoint
from memtrans.training.settings import Settings, build_model
from memtrans.training.step import make_optimizer
from memtrans.training.weights import load_moments, load_weights, moments_of, weights_of

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


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_moments_come_back_by_the_places_of_their_parameters(optimizer: str) -> None:
    settings = dataclasses.replace(SMALL, optimizer=optimizer)
    saved = moments_of(trained(settings)[1])
    assert "0.step" in saved
    _, fresh = trained(settings, steps=0)
    assert moments_of(fresh) == {}
    load_moments(fresh, saved)
    found = moments_of(fresh)
    assert set(found) == set(saved)
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())


def test_the_moments_of_another_optimiser_are_refused() -> None:
    saved = moments_of(trained(SMALL)[1])
    _, other = trained(dataclasses.replace(SMALL, optimizer="adafactor"), steps=0)
    with pytest.raises(ValueError, match=r"this model's moments, 0.col_var of shape .* got None"):
        load_moments(other, saved)
    assert moments_of(other) == {}
