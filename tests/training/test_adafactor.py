"""Adafactor is the formula of PyTorch's, without a number that the host must know."""

from __future__ import annotations

import pytest
import torch
from helpers.checks import SAME_GRAPH, assert_close
from helpers.devices import DEVICE, default_dtype, seeded

from memtrans.training.adafactor import Adafactor

pytestmark = pytest.mark.device

SHAPES = ((5, 7), (6,), (4, 1, 1), (1,), (2, 3, 4))
STEPS = 30


def weights() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(3 * torch.randn(shape, generator=seeded(len(shape)))) for shape in SHAPES]


def move(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], seed: int) -> None:
    generator = seeded(seed)
    for weight in parameters:
        weight.grad = torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * (1 + seed % 5)
    optimizer.step()


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"d": 2.0}, {"beta2_decay": -0.5}])
def test_it_moves_weights_as_pytorchs_does(options):
    ours, theirs = weights(), weights()
    optimizers = Adafactor(ours, lr=0.02, **options), torch.optim.Adafactor(theirs, lr=0.02, **options)
    for step in range(STEPS):
        for optimizer, parameters in zip(optimizers, (ours, theirs), strict=True):
            move(optimizer, parameters, step)
    for weight, expected in zip(ours, theirs, strict=True):
        assert_close(weight, expected, SAME_GRAPH, str(tuple(weight.shape)))


def test_a_rate_may_live_on_the_device():
    ours, theirs = weights(), weights()
    for parameters, rate in ((ours, torch.tensor(0.02)), (theirs, 0.02)):
        move(Adafactor(parameters, lr=rate), parameters, 0)
    for weight, expected in zip(ours, theirs, strict=True):
        assert_close(weight, expected, SAME_GRAPH)


def test_a_step_whose_gradient_is_not_finite_changes_nothing():
    parameters = weights()
    optimizer = Adafactor(parameters)
    move(optimizer, parameters, 0)
    held = [weight.clone() for weight in parameters]
    state = {name: tensor.clone() for name, tensor in optimizer.state[parameters[0]].items()}
    for weight in parameters:
        weight.grad = torch.full_like(weight, torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(weight, kept) for weight, kept in zip(parameters, held, strict=True))
    assert all(torch.equal(tensor, state[name]) for name, tensor in optimizer.state[parameters[0]].items())
    optimizer.found_inf = torch.zeros(())
    move(optimizer, parameters, 1)
    assert not any(torch.equal(weight, kept) for weight, kept in zip(parameters, held, strict=True))


def test_a_matrix_keeps_a_row_and_a_column():
    weight = torch.nn.Parameter(torch.ones(50, 70))
    optimizer = Adafactor([weight])
    move(optimizer, [weight], 0)
    assert sum(tensor.numel() for tensor in optimizer.state[weight].values()) == 50 + 70 + 1
    assert all(tensor.device.type == DEVICE for tensor in optimizer.state[weight].values())


def test_a_loaded_state_goes_on_where_it_was():
    through, stopped = weights(), weights()
    optimizer, before = Adafactor(through), Adafactor(stopped)
    for step in range(4):
        move(optimizer, through, step)
    for step in range(2):
        move(before, stopped, step)
    after = Adafactor(stopped)
    after.load_state_dict(before.state_dict())
    for step in range(2, 4):
        move(after, stopped, step)
    assert all(torch.equal(weight, expected) for weight, expected in zip(stopped, through, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr and weight_decay must be at least 0, got -1\.0 and 0\.0"),
        ({"beta2_decay": 0.5}, r"beta2_decay must be at most 0.* got 0\.5"),
        ({"d": 0.5}, r"d at least 1, got .* 0\.5"),
    ],
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Adafactor(weights(), **options)


def test_a_closure_is_refused():
    with pytest.raises(ValueError, match="closure must be None"):
        Adafactor(weights()).step(lambda: 0.0)


def test_21_16_steps_are_counted_in_float32_whatever_the_default_is():
    """bfloat16 counts to 256 and stays there."""
    parameters = weights()
    with default_dtype(torch.bfloat16):
        optimizer = Adafactor(parameters)
        for seed in range(260):
            move(optimizer, parameters, seed)
    assert optimizer.state[parameters[0]]["step"].item() == 260
