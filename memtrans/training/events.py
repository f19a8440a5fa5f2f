"""The record of a run as tensorboard draws it, beside metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

GROUPS = {"eval": "held out", "recall": "recall", "memory": "memory"}  # of curves, by the beginning of their names
COUNTED = ("step", "tokens")  # not drawn


class NoEvents:
    """Where nothing is to be drawn."""

    def append(self, line: Mapping[str, Any]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class Events(NoEvents):
    """Writes the numbers of each report to a directory that tensorboard reads.

    directory: made if missing. step: of the checkpoint that the run goes on from; later points are taken back.

    Raises ValueError where tensorboard is not installed, OSError where the directory cannot be written to.
    """

    def __init__(self, directory: Path, step: int) -> None:
        self._writer = _library()(str(directory), purge_step=step + 1)

    def append(self, line: Mapping[str, Any]) -> None:
        """Writes each number of a report, and makes sure that it is in the file."""
        for name, value in line.items():
            if isinstance(value, dict):
                for position, of_segments in value.items():
                    self._writer.add_scalar(f"{_label(name)}/from {position}", of_segments, line["step"])
            elif value is not None and name not in COUNTED:
                self._writer.add_scalar(_label(name), value, line["step"])
        self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()


def _label(name: str) -> str:
    """The name of a curve, with the group that it is drawn in.

    >>> _label("eval_bits_per_byte"), _label("bits_per_byte")
    ('held out/eval_bits_per_byte', 'training/bits_per_byte')
    """
    return f"{GROUPS.get(name.split('_')[0], 'training')}/{name}"


def check_events() -> None:
    """Raises ValueError where tensorboard is not installed."""
    _library()


def _library() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"log must not be tensorboard without it: pip install 'memtrans[tensorboard]' ({error})"
        ) from error
    return SummaryWriter
