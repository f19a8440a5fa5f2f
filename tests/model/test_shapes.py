"""Modules of shapes alone are the modules, without their numbers."""

from __future__ import annotations

import torch
from torch import nn

from memtrans import MemorizingTransformer
from memtrans.shapes import shapes_alone


def build() -> MemorizingTransformer:
    return MemorizingTransformer(num_tokens=30, dim=16, depth=2, dim_head=8, heads=2, memorizing_layers=1, kv_heads=2)


def test_names_and_shapes_are_those_of_the_model_and_nothing_is_drawn() -> None:
    torch.manual_seed(0)
    with shapes_alone():
        model = build()
    unchanged = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(unchanged, torch.rand(3))
    expected, found = build().state_dict(), model.state_dict()
    assert {name: weight.shape for name, weight in found.items()} == {n: w.shape for n, w in expected.items()}
    assert all(weight.is_meta for weight in found.values())


def test_outside_of_it_numbers_are_drawn_again() -> None:
    with shapes_alone():
        nn.Linear(2, 2)
    assert float(nn.init.ones_(torch.zeros(2)).sum()) == 2.0
    assert not nn.Linear(2, 2).weight.is_meta


def test_what_is_made_on_a_device_by_name_has_its_numbers() -> None:
    with shapes_alone():
        slopes = nn.init.constant_(torch.empty(8, device="cpu"), 0.5)
        with torch.device("cpu"):
            weight = nn.Linear(3, 3).weight
    assert torch.equal(slopes, torch.full((8,), 0.5))
    assert not weight.is_meta and 0 < float(weight.detach().abs().max()) < 1


def test_initialisers_called_by_name_of_their_tensor_are_left_out_too() -> None:
    with shapes_alone():
        weight = nn.init.normal_(tensor=torch.empty(10**6, 10**6))
    assert weight.shape == (10**6, 10**6) and weight.is_meta
