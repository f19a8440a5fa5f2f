"""Trainers of small models on the CPU: what they read, their variants, and how to compare what they became."""

from __future__ import annotations

import dataclasses

import torch

from memtrans.data.stream import DocumentStream
from memtrans.training.checkpoint import Checkpoint
from memtrans.training.data import open_data
from memtrans.training.settings import Settings
from memtrans.training.trainer import Trainer

SMALL = Settings(
    data="recall",
    steps=12,
    batch=3,
    segment=32,
    layers=2,
    width=16,
    heads=2,
    head_width=8,
    memory=64,
    neighbours=4,
    warmup=2,
    eval_bytes=200,
)
VARIANTS = {
    "plain": SMALL,
    "dropout": dataclasses.replace(SMALL, dropout=0.2),
    "xl": dataclasses.replace(SMALL, xl=16, xl_layers=(1, 2)),
    "several segments before one backward": dataclasses.replace(SMALL, segments=3),
    "several backward passes before one step": dataclasses.replace(SMALL, accumulate=2, xl=8),
    "without memory": dataclasses.replace(SMALL, memory=0),
    "grouped heads": dataclasses.replace(SMALL, kv_heads=2),
    "adafactor": dataclasses.replace(SMALL, optimizer="adafactor", schedule="inverse-sqrt", clip=None),
    "muon": dataclasses.replace(SMALL, optimizer="muon", accumulate=2, skip_nonfinite=True),
    "memories that come late": dataclasses.replace(SMALL, memory_late=0.5, keep_memory=True),
    "memories kept": dataclasses.replace(SMALL, keep_memory=True, xl=16),
}


def trainer_of(settings: Settings) -> Trainer:
    """A run that has not begun."""
    return Trainer(settings, open_data(settings), torch.device("cpu"))


def advance(trainer: Trainer, steps: int) -> None:
    """So many steps."""
    for _ in range(steps):
        trainer.advance()


def row_tokens(trainer: Trainer, row: int) -> int:
    """Real tokens that a row has read since the run began."""
    settings = trainer.settings
    stream = DocumentStream(open_data(settings).order, settings.batch, settings.segment)
    return sum(int(stream.next().lengths[row]) for _ in range(trainer.step))


def checkpoint_of(trainer: Trainer) -> Checkpoint:
    """What would be saved now, without files."""
    return Checkpoint(*trainer.state())


def assert_same_state(left: Trainer, right: Trainer) -> None:
    """Two runs would save the same, to the last bit."""
    (left_parts, left_values), (right_parts, right_values) = left.state(), right.state()
    assert left_values == right_values
    for part in left_parts:
        assert set(left_parts[part]) == set(right_parts[part])
        for name, tensor in left_parts[part].items():
            assert torch.equal(tensor, right_parts[part][name]), (part, name)
