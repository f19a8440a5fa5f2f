"""Documents as streams of segments: every row of a batch walks its own documents from beginning to end.

Shapes: B rows of the batch, N tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from memtrans.annotations import allows
from memtrans.data.documents import Document, DocumentOrder
from memtrans.data.tokens import BYTES

MOST_SHOWN = 200  # characters of a state that an error shows
NOT_SCORED = -1  # a label that no loss counts; every byte value is a token


@dataclass(frozen=True, eq=False)
class Batch:
    """One segment of every row, or of those that a rank owns.

    Attributes:
        tokens: (B, N) int64; zeros in the padding.
        labels: (B, N) int64, the token after each token; NOT_SCORED in the padding and where nothing is asked.
        lengths: (B,) int64, real tokens of each row; the padding sits at the tail.
        fresh: (B,) bool, rows that begin a document with this segment.
        offsets: (B,) int64, where in its document each row's segment begins.
        distances: (B, N) int64 or None: how long ago each label was given away, 0 where it was not (`recall`).
        scored: labels that are scored in all rows of the stream, counted on the host.
        real: real tokens in all of them, counted on the host.
        sizes: (B, N) int64, bytes of each label; None where each is a byte.
        more: bytes of the labels of all rows beyond one each, counted on the host; 0 where each is a byte.
    """

    tokens: Tensor
    labels: Tensor
    lengths: Tensor
    fresh: Tensor
    offsets: Tensor
    distances: Tensor | None
    scored: int
    real: int
    sizes: Tensor | None = None
    more: int = 0

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; a copy from pinned memory does not wait."""

        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


@dataclass
class _Row:
    """Where a row stands: the document's number in the order (-1: none any more) and the next byte."""

    index: int
    offset: int
    document: Document | None


class DocumentStream:
    """Batches in which every row walks its own documents in order; a row that ends one takes the next free one.

    A document's last byte is only a label. Its last segment is padded. The position is two numbers a row, so that a
    stream that loads the state of another one continues with the same batches.

    Args:
        order: what the rows take. batch: B. segment: N.
        rows: those whose tokens are filled in. Default: all. The stream walks all of them, so that each rank of a run
            takes the documents that it would get in a run of one process.

    Raises:
        ValueError: a size below 1.

    >>> from memtrans.data.documents import InOrder
    >>> stream = DocumentStream(InOrder([Document.of("a", b"abcd")]), batch=1, segment=2)
    >>> first, second = stream.next(), stream.next()
    >>> bytes(first.labels[0].tolist()), second.labels.tolist(), second.lengths.tolist()
    (b'bc', [[100, -1]], [1])
    """

    def __init__(self, order: DocumentOrder, batch: int, segment: int, rows: range | None = None) -> None:
        for name, size in {"batch": batch, "segment": segment}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.order, self.batch, self.segment = order, batch, segment
        self.rows = range(batch) if rows is None else rows
        self._taken = 0
        self._rows = [_Row(-1, 0, None) for _ in range(batch)]

    def next(self) -> Batch | None:
        """The next segment of `rows`, on the CPU; None when every document was read, by whatever row."""
        size = (len(self.rows), self.segment)
        tokens = torch.zeros(size, dtype=torch.int64, device="cpu")
        labels = torch.full(size, NOT_SCORED, dtype=torch.int64, device="cpu")
        distances = torch.zeros(size, dtype=torch.int64, device="cpu")
        fresh = [self._advance(row) for row in self._rows]
        offsets = [row.offset for row in self._rows]
        spans = [self._span(row) for row in self._rows]  # (length, scored, bytes) of each
        if not any(length for length, _, _ in spans):
            return None
        for place, b in enumerate(self.rows):
            _fill(self._rows[b].document, offsets[b], spans[b][0], tokens[place], labels[place], distances[place])
        asks = any(row.document is not None and row.document.distances is not None for row in self._rows)
        bytes_alone = all(row.document is None or row.document.tokenizer is BYTES for row in self._rows)
        return Batch(
            tokens,
            labels,
            torch.tensor([spans[b][0] for b in self.rows], dtype=torch.int64, device="cpu"),
            torch.tensor([fresh[b] for b in self.rows], dtype=torch.bool, device="cpu"),
            torch.tensor([offsets[b] for b in self.rows], dtype=torch.int64, device="cpu"),
            distances if asks else None,
            scored=sum(scored for _, scored, _ in spans),
            real=sum(length for length, _, _ in spans),
            sizes=None if bytes_alone else self._sizes(labels),
            more=sum(size - length for length, _, size in spans),
        )

    def __iter__(self) -> Iterator[Batch]:
        """Every batch that is left."""
        while (batch := self.next()) is not None:
            yield batch

    def _advance(self, row: _Row) -> bool:
        """Gives a row that has no byte left to read its next document; True if it got one."""
        if row.document is not None and row.offset < len(row.document) - 1:
            return False
        count = self.order.count
        if count is not None and self._taken >= count:
            row.index, row.document = -1, None
            return False
        row.index, row.offset, row.document = self._taken, 0, self.order.document(self._taken)
        self._taken += 1
        return True

    def _span(self, row: _Row) -> tuple[int, int, int]:
        """Moves a row on by a segment.

        Returns how many of its tokens are real, how many of their labels scored, and how many bytes the labels have.
        """
        if row.document is None:
            return 0, 0, 0
        start, row.offset = row.offset, min(row.offset + self.segment, len(row.document) - 1)
        length = row.offset - start
        if row.document.distances is None:
            return length, length, row.document.size(start + 1, row.offset + 1)
        return length, int(row.document.distances[start : row.offset].count_nonzero()), length

    def _sizes(self, labels: Tensor) -> Tensor:
        """Bytes of each label (B, N), 0 where none is scored."""
        tokenizer = next(row.document.tokenizer for row in self._rows if row.document is not None)
        sizes = torch.from_numpy(tokenizer.sizes[labels.clamp(min=0).numpy()])
        return sizes.masked_fill(labels == NOT_SCORED, 0)

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON can hold it."""
        return {"taken": self._taken, "rows": [[row.index, row.offset] for row in self._rows]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position that `state_dict` told. Raises ValueError when it is of another batch."""
        if not allows(int, state["taken"]) or not allows(list[list[int]], state["rows"]):
            raise ValueError(f"state must hold numbers of documents and places in them, got {str(state)[:MOST_SHOWN]}")
        if any(len(row) != 2 for row in state["rows"]) or state["taken"] < 0:
            raise ValueError(f"state must hold two numbers for each row, got {str(state)[:MOST_SHOWN]}")
        if len(state["rows"]) != self.batch:
            raise ValueError(f"state must hold {self.batch} rows, got {len(state['rows'])}")
        rows = [
            _Row(index, offset, self.order.document(index) if index >= 0 else None) for index, offset in state["rows"]
        ]
        for row in rows:
            if row.document is not None and not 0 <= row.offset < len(row.document):
                kind = "bytes" if row.document.tokenizer is BYTES else "tokens"
                raise ValueError(f"state must hold places in documents of {len(row.document)} {kind}, got {row.offset}")
        self._taken, self._rows = state["taken"], rows


def _fill(
    document: Document | None, start: int, length: int, tokens: Tensor, labels: Tensor, distances: Tensor
) -> None:
    """Writes a row's segment (N,), of which so many tokens are real."""
    if document is None:
        return
    end = start + length
    tokens[:length] = document.content[start:end]
    labels[:length] = document.content[start + 1 : end + 1]
    if document.distances is not None:
        distances[:length] = document.distances[start:end]
        labels[distances == 0] = NOT_SCORED
