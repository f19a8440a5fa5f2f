"""A step that is replayed notices when what it was captured with is somewhere else; one over a large vocabulary learns
the same without holding its logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.checks import SAME_SUMS, assert_close, error_of

from memtrans import cross_entropy
from memtrans.training.data import open_data
from memtrans.training.settings import Settings
from memtrans.training.step import captures
from memtrans.training.trainer import Trainer

SEGMENT = 8


class Captured:
    """What `Replay` is to a step, without a GPU: captured by its first call."""

    capture = True

    def __init__(self, function: Callable[[], None]) -> None:
        self.function, self.captured, self.released = function, False, 0

    def __call__(self) -> None:
        self.function()
        self.captured = True

    def release(self) -> None:
        self.released += self.captured
        self.captured = False


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "text.txt").write_text("the same old words again and again " * 40)
    return Settings(
        steps=10, batch=2, segment=SEGMENT, layers=2, width=16, heads=2, head_width=8, memory=32, memory_layers=(2,),
        neighbours=4, compile=False, data=str(tmp_path / "text.txt"),
    )  # fmt: skip


@pytest.fixture
def trainer(settings: Settings) -> Trainer:
    made = Trainer(settings, open_data(settings), torch.device("cpu"))
    made._step._graph = Captured(made._step._compute)
    return made


def test_a_replayed_step_is_captured_anew_when_a_memory_was_widened_or_loaded(trainer: Trainer) -> None:
    graph = trainer._step._graph
    for _ in range(2):
        trainer.advance()
    trainer.reader.look(torch.zeros(2, SEGMENT, dtype=torch.int64), torch.full((2,), SEGMENT))
    trainer.advance()
    assert graph.released == 0
    longer = 4 * SEGMENT  # than the memory has room for
    trainer.reader.look(torch.zeros(2, longer, dtype=torch.int64), torch.full((2,), longer))
    trainer.advance()
    assert graph.released == 1
    trainer.advance()
    assert graph.released == 1
    trainer.reader.load_state_dict(trainer.reader.state_dict())
    trainer.advance()
    assert graph.released == 2


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(("compiled", "capture", "captured"), [
    (None, None, True), (True, None, True), (False, None, "alone"), (None, False, False), (True, False, False),
    (False, False, False), (False, True, True),
])  # fmt: skip
def test_steps_are_captured_on_a_gpu_unless_the_settings_say_otherwise(
    settings: Settings, on_gpu: bool, alone: bool, compiled: bool | None, capture: bool | None, captured: bool | str
) -> None:
    """But for those of several ranks that are not compiled."""
    reader = SimpleNamespace(on_gpu=on_gpu)
    expected = on_gpu and (alone if captured == "alone" else captured)
    assert captures(dataclasses.replace(settings, compile=compiled, capture=capture), reader, alone) == expected


def test_what_is_spread_over_ranks_is_not_captured(settings: Settings) -> None:
    for alone in (True, False):
        assert not captures(dataclasses.replace(settings, fsdp=True), SimpleNamespace(on_gpu=True), alone)


def test_a_run_without_a_gpu_refuses_to_be_captured(settings: Settings) -> None:
    trainer = Trainer(settings, open_data(settings), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"capture must be off without a GPU, got True on cpu \(--no-capture\)"):
        Trainer(dataclasses.replace(settings, capture=True), trainer.data, torch.device("cpu"))


def test_storage_that_a_memory_left_goes_with_the_graph(trainer: Trainer) -> None:
    step, held = trainer._step, []
    trainer.advance()

    def compute() -> None:
        held.append(list(step._captured_with))
        step._compute()

    step._graph.function = compute
    trainer.reader.look(torch.zeros(2, 4 * SEGMENT, dtype=torch.int64), torch.full((2,), 4 * SEGMENT))
    trainer.advance()
    assert held == [[]]


# ------------------------------------------------------------------------------------------------ a large vocabulary


def curve(settings: Settings) -> torch.Tensor:
    """Losses and norms (steps, 3)."""
    torch._dynamo.reset()
    trainer = Trainer(settings, open_data(settings), torch.device("cpu"))
    for _ in range(settings.steps):
        trainer.advance()
    return trainer.check()


WAYS = {
    "eager": {},
    "rounded once a step": {"dtype": "bfloat16"},
    "several segments": {"dtype": "bfloat16", "segments": 2, "accumulate": 2, "xl": 8, "xl_layers": (1,)},
    "compiled": {"compile": True, "dtype": "bfloat16", "xl": 8, "xl_layers": (1,)},
}


SLOW = pytest.mark.slow  # a compiler at work; GPU tests have it, too


@pytest.mark.parametrize("way", [pytest.param(way, marks=SLOW) if way == "compiled" else way for way in WAYS])
def test_a_step_whose_logits_come_in_chunks_has_the_curve_of_one_that_holds_them(
    settings: Settings, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(settings, warmup=0, **WAYS[way])
    exact = curve(dataclasses.replace(settings, dtype="float32", compile=False))
    rounding = error_of(curve(settings), exact)
    monkeypatch.setattr(cross_entropy, "MOST_LOGITS", settings.batch * SEGMENT * settings.vocabulary - 1)
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 5 * settings.vocabulary)
    monkeypatch.setattr("memtrans.training.step.negative_log_likelihood", None)  # of all logits
    assert_close(curve(settings), exact, max(SAME_SUMS, 2 * rounding))
