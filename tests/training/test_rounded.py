"""Weights that a step rounds once are read like those that autocast rounds in each segment."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers.tiny_runs import written_text
from torch import nn
from torch.profiler import ProfilerActivity, profile

from memtrans import cross_entropy
from memtrans.training.data import open_data
from memtrans.training.rounded import RoundedWeights
from memtrans.training.settings import Settings
from memtrans.training.trainer import Trainer

pytestmark = pytest.mark.cpu
ROUNDS = 3
SETTINGS = Settings(
    batch=2, segment=16, accumulate=ROUNDS, layers=2, width=16, heads=2, head_width=8, memory=32, memory_layers=(1,),
    neighbours=4, xl=16, xl_layers=(2,), eval_bytes=300, compile=False, dtype="bfloat16", warmup=0,
)  # fmt: skip


@pytest.fixture
def trainer_of(tmp_path: Path) -> Callable[..., Trainer]:
    text = written_text(tmp_path)

    def made(**changes: object) -> Trainer:
        settings = dataclasses.replace(SETTINGS, data=text, **changes)
        return Trainer(settings, open_data(settings), torch.device("cpu"))

    return made


def without(trainer: Trainer) -> Trainer:
    """One that leaves all rounding to autocast."""
    assert trainer._step._rounded is not None
    trainer._step._rounded = None
    return trainer


def casts(trainer: Trainer) -> int:
    """How many casts a step makes."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        trainer.advance()
    return sum(event.count for event in found.key_averages() if event.key == "aten::_to_copy")


@pytest.mark.parametrize("most_logits", [cross_entropy.MOST_LOGITS, 0], ids=["", "in chunks"])
@pytest.mark.parametrize("changes", [{}, {"accumulate": 1}, {"dropout": 0.1}, {"clip": 0.1, "skip_nonfinite": True}])
def test_a_step_that_rounds_weights_once_learns_the_same_bits(
    trainer_of: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, changes: dict, most_logits: int
) -> None:
    monkeypatch.setattr(cross_entropy, "MOST_LOGITS", most_logits)
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 7 * 256)
    ours, autocast = trainer_of(**changes), without(trainer_of(**changes))
    for trainer in (ours, autocast):
        torch.manual_seed(0)  # of dropout
        for _ in range(4):
            trainer.advance()
    assert torch.equal(ours.check(), autocast.check())
    for one, other in zip(ours.model.parameters(), autocast.model.parameters(), strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)


@pytest.mark.slow
def test_a_compiled_step_learns_the_same_bits_and_is_compiled_once(trainer_of: Callable[..., Trainer]) -> None:
    """Although each step puts other parameters in the places of the model's own."""
    ours, autocast = trainer_of(compile=True), without(trainer_of(compile=True))
    for trainer in (autocast, ours):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for _ in range(3):
            trainer.advance()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for one, other in zip(ours.model.parameters(), autocast.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_no_segment_rounds_a_weight_or_casts_its_gradient(trainer_of: Callable[..., Trainer]) -> None:
    ours, autocast = trainer_of(), without(trainer_of())
    linear = [module for module in ours.model.modules() if isinstance(module, nn.Linear)]
    weights = sum(len(list(module.parameters())) for module in linear)
    weights -= len(ours.model.layers)  # autocast casts both projections of an attention as one
    assert casts(autocast) - casts(ours) == 2 * weights * ROUNDS


@pytest.mark.parametrize("changes", [{"dtype": "float32"}, {"segments": 2}])
def test_what_autocast_does_otherwise_is_left_to_it(trainer_of: Callable[..., Trainer], changes: dict) -> None:
    assert trainer_of(**changes)._step._rounded is None


def test_a_model_has_its_own_weights_again_when_a_step_fails() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    own = dict(model.named_parameters())
    seen = []

    def segment() -> None:
        with RoundedWeights(model, torch.bfloat16).reading():
            seen.extend(parameter.dtype for parameter in model.parameters())
            raise RuntimeError("in a segment")

    with pytest.raises(RuntimeError, match="in a segment"):
        segment()
    assert seen == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert all(parameter is own[name] for name, parameter in model.named_parameters())


def test_frozen_weights_are_read_rounded_and_stay_without_a_gradient() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    model.bias.requires_grad_(True)
    weights = RoundedWeights(model, torch.bfloat16)
    with weights.reading():
        model(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
        weights.collect()
    assert model.weight.grad is None and model.bias.grad.tolist() == [1.0, 1.0]


class Same(nn.Linear):
    """A layer of another class, whose forward pass may be another."""


def tied(kind: Callable[..., nn.Module]) -> nn.Sequential:
    """Two layers with one weight, the second of them PyTorch's linear layer."""
    model = nn.Sequential(kind(4, 4), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    return model


def hooked(register: Callable[[nn.Parameter], object]) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4))
    register(model[0].weight)
    return model


def doubled(parameter: nn.Parameter) -> None:
    parameter.grad *= 2


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    ("made", "given"),
    [
        (lambda: tied(nn.Embedding), torch.tensor([0, 3])),
        (lambda: tied(Same), torch.rand(2, 4)),
        (lambda: tied(nn.Linear), torch.rand(2, 4)),
        (lambda: nn.utils.weight_norm(nn.Linear(4, 4)), torch.rand(2, 4)),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), torch.rand(2, 4)),
        (lambda: hooked(lambda weight: weight.register_hook(lambda grad: 2 * grad)), torch.rand(2, 4)),
        (lambda: hooked(lambda weight: weight.register_post_accumulate_grad_hook(doubled)), torch.rand(2, 4)),
    ],
    ids=[
        "an embedding",
        "another class",
        "a linear layer",
        "weight_norm",
        "a parametrisation",
        "a hook",
        "a late hook",
    ],
)
def test_a_weight_that_others_read_too_has_the_whole_gradient(
    made: Callable[[], nn.Module], given: torch.Tensor
) -> None:
    found = []
    for rounds in (True, False):
        torch.manual_seed(0)
        model = made()
        weights = RoundedWeights(model, torch.bfloat16)
        with weights.reading() if rounds else nullcontext():
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(given).float().sin().sum()
            loss.backward()
            if rounds:
                weights.collect()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(ours, autocast) for ours, autocast in zip(*found, strict=True))
