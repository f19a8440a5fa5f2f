"""A step that is replayed notices when what it was captured with is somewhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from memtrans.training.data import open_data
from memtrans.training.settings import Settings
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
def trainer(tmp_path: Path) -> Trainer:
    (tmp_path / "text.txt").write_text("the same old words again and again " * 40)
    settings = Settings(
        steps=10, batch=2, segment=SEGMENT, layers=2, width=16, heads=2, head_width=8, memory=32, memory_layers=(2,),
        neighbours=4, compile=False, data=str(tmp_path / "text.txt"),
    )  # fmt: skip
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
