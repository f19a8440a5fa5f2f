"""The learning rate warms up and decays, as either schedule says; what makes a memory's own query has ten times it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from memtrans.training.model import build_model
from memtrans.training.optimizer import OWN_QUERY, learning_rate, make_optimizer, set_rate
from memtrans.training.settings import Settings

SMALL = Settings(layers=2, width=16, heads=2, head_width=8, memory=64, weight_decay=0.5)


def test_the_papers_learning_rate_is_the_inverse_root_of_the_step():
    settings = Settings(schedule="inverse-sqrt", warmup=1000, learning_rate=3.0)
    rates = [learning_rate(settings, step) for step in range(5000)]
    assert rates.index(max(rates)) == 999
    assert rates[:1000] == [pytest.approx(3 / 1000**0.5 * (step + 1) / 1000) for step in range(1000)]
    assert rates[1000:] == [pytest.approx(3 / (step + 1) ** 0.5) for step in range(1000, 5000)]


def test_the_learning_rate_warms_up_and_decays():
    settings = Settings(steps=100, warmup=10, learning_rate=2.0, final_rate=0.1)
    rates = [learning_rate(settings, step) for step in range(101)]
    assert rates[:10] == [pytest.approx(0.2 * (step + 1)) for step in range(10)]
    assert rates[10] == max(rates) == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.2)


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon"])
def test_a_memorys_own_query_is_learned_at_ten_times_the_rate_and_does_not_decay(kind: str) -> None:
    model = build_model(dataclasses.replace(SMALL, optimizer=kind, memory_query="own"))
    optimizer = make_optimizer(model, dataclasses.replace(SMALL, optimizer=kind))
    set_rate(optimizer, 0.25)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[one]: group for group in optimizer.param_groups for one in group["params"]}
    assert found.keys() == set(names.values())
    for name, group in found.items():
        assert group["lr"] == (2.5 if name.endswith(OWN_QUERY) else 0.25), name
    assert [found[f"layers.0.0.fn{name}"]["weight_decay"] for name in OWN_QUERY] == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon"])
def test_without_one_all_have_the_rate(kind: str) -> None:
    optimizer = make_optimizer(build_model(SMALL), dataclasses.replace(SMALL, optimizer=kind))
    set_rate(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}
    assert len(optimizer.param_groups) == (3 if kind == "muon" else 2)


def test_a_rate_on_the_device_is_set_where_it_lies() -> None:
    """As a graph that was captured reads it: two numbers, of which neither is written for the other."""
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(3)]
    rate = torch.tensor(1.0)
    groups = [{"params": weights[:1]}, {"params": weights[1:2]}, {"params": weights[2:], "rate_factor": 10.0}]
    optimizer = torch.optim.SGD([*groups[:2], {**groups[2], "lr": 10.0 * rate}], lr=rate)
    places: list[Tensor] = [group["lr"] for group in optimizer.param_groups]
    set_rate(optimizer, 0.5)
    assert [float(place) for place in places] == [0.5, 0.5, 5.0]
    for weight in weights:
        weight.grad = torch.ones(1)
    optimizer.step()
    assert [weight.item() for weight in weights] == [0.5, 0.5, -4.0]
