"""The segments of an optimiser step on their device, drawn while the device still works on the step before.

Shapes: A backward passes a step, S segments a backward pass, B rows, N tokens of a segment.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memtrans.data.stream import Batch, DocumentStream


@dataclass(frozen=True, eq=False)
class StepInputs:
    """What one optimiser step reads; the fields of `Batch`, stacked.

    Attributes:
        tokens, labels: (A, S, B, N) int64. lengths: (A, S, B) int64. fresh: (A, S, B) bool.
        scored: () float32, how many labels are scored in all of them; at least 1.
        per_byte: () float32, scored labels for each byte of their text; 1 where tokens are bytes.
    """

    tokens: Tensor
    labels: Tensor
    lengths: Tensor
    fresh: Tensor
    scored: Tensor
    per_byte: Tensor

    @classmethod
    def of(cls, rounds: list[list[Batch]]) -> StepInputs:
        """Stacks the batches of A rounds of S segments."""

        def stacked(name: str) -> Tensor:
            return torch.stack([torch.stack([getattr(batch, name) for batch in segments]) for segments in rounds])

        scored = sum(batch.scored for segments in rounds for batch in segments)
        size = scored + sum(batch.more for segments in rounds for batch in segments)
        scalars = (
            torch.tensor(value, dtype=torch.float32, device="cpu")
            for value in (max(1, scored), max(1, scored) / max(1, size))
        )
        tokens, labels, lengths, fresh = map(stacked, ("tokens", "labels", "lengths", "fresh"))
        return cls(tokens, labels, lengths, fresh, *scalars)

    def rounds(self) -> list[list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
        """tokens, labels, lengths and fresh of each segment of each backward pass."""
        fields = (self.tokens, self.labels, self.lengths, self.fresh)
        count, segments = self.tokens.shape[:2]
        return [[tuple(field[a, s] for field in fields) for s in range(segments)] for a in range(count)]  # type: ignore[misc]

    def tensors(self) -> tuple[Tensor, ...]:
        """The fields in their order."""
        return tuple(getattr(self, field.name) for field in fields(self))


class _Drawn(NamedTuple):
    """A step's inputs, its real tokens, and where the stream stood before they were drawn."""

    inputs: StepInputs
    real: int
    before: dict[str, Any]
    copied: torch.cuda.Event | None  # None on the CPU


class _Pinned(NamedTuple):
    """Page-locked memory that a step's inputs were copied from, and what says when they had been."""

    tensors: list[Tensor]
    copied: torch.cuda.Event


class StepLoader:
    """Draws the segments of one step after another from a stream.

    On a GPU `prepare` draws a step ahead, into pinned memory and over a stream of its own; the state of the loader is
    that of the steps that were taken, whatever was drawn ahead. Two sets of pinned memory serve by turns, because
    pinning is slow: 4.5 ms a tensor on the host of an H200.

    Args:
        stream: of an order without end. accumulate: A. segments: S. device: where the inputs go.

    >>> from memtrans.data.documents import Document, Shuffled
    >>> stream = DocumentStream(Shuffled([Document.of("text", b"twelve bytes")], seed=0), batch=1, segment=4)
    >>> inputs, real = StepLoader(stream, accumulate=1, segments=2, device=torch.device("cpu")).take()
    >>> inputs.tokens.shape, real
    (torch.Size([1, 2, 1, 4]), 8)
    """

    def __init__(self, stream: DocumentStream, accumulate: int, segments: int, device: torch.device) -> None:
        self.stream, self.accumulate, self.segments, self.device = stream, accumulate, segments, device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: _Drawn | None = None
        self._pinned: list[_Pinned | None] = [None, None]

    def take(self) -> tuple[StepInputs, int]:
        """The inputs of the next step, and how many real tokens they hold."""
        drawn, self._ahead = self._ahead or self._draw(), None
        if drawn.copied is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(drawn.copied)
            for tensor in drawn.inputs.tensors():
                tensor.record_stream(here)
        return drawn.inputs, drawn.real

    def prepare(self) -> None:
        """Draws the step after the one that was taken, if the device can go on meanwhile."""
        if self._copies is not None and self._ahead is None:
            self._ahead = self._draw()

    def _draw(self) -> _Drawn:
        before = self.stream.state_dict()
        rounds = [[self._segment() for _ in range(self.segments)] for _ in range(self.accumulate)]
        inputs, real = StepInputs.of(rounds), sum(batch.real for segments in rounds for batch in segments)
        if self._copies is None:
            return _Drawn(inputs, real, before, None)
        moved, copied = self._copied(inputs)
        return _Drawn(moved, real, before, copied)

    def _copied(self, inputs: StepInputs) -> tuple[StepInputs, torch.cuda.Event]:
        """The inputs on the device, once the event has come."""
        assert self._copies is not None
        used, last = self._pinned
        if used is None or used.tensors[0].shape != inputs.tokens.shape:
            tensors = [tensor.pin_memory() for tensor in inputs.tensors()]
        else:
            tensors = used.tensors
            used.copied.synchronize()  # that was two steps ago
            for place, tensor in zip(tensors, inputs.tensors(), strict=True):
                place.copy_(tensor)
        with torch.cuda.stream(self._copies):
            moved = StepInputs(*(tensor.to(self.device, non_blocking=True) for tensor in tensors))
            copied = self._copies.record_event()
        self._pinned = [last, _Pinned(tensors, copied)]
        return moved, copied

    def _segment(self) -> Batch:
        batch = self.stream.next()
        assert batch is not None, "training orders have no end"
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position after the steps that were taken, as JSON can hold it."""
        return self.stream.state_dict() if self._ahead is None else self._ahead.before

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position that `state_dict` told."""
        self._ahead = None
        self.stream.load_state_dict(state)
