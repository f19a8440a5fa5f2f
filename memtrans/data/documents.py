"""Documents as streams of bytes: every row of a batch walks its own documents in order, segment by segment.

Shapes: B rows of the batch, N tokens of a segment. A token is a byte; byte 0 is a byte like any other.

`Corpus` (see `sources.py`) holds documents that exist; an *order* says which document a row takes next: `Shuffled`
documents, `RandomWindows` cut from them (upstream's way), or `recall.RecallDocuments`, made on the fly.
`DocumentStream` walks any of them.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

NOT_SCORED = -1  # a label that no loss counts; every byte value is a token


@dataclass(frozen=True, eq=False)
class Document:
    """A text that is read from its first byte to its last.

    Attributes:
        name: for messages and samples.
        content: (length,) uint8.
        distances: (length,) int64 or None. Where given, only the bytes *after* positions with a distance above 0 are
            scored; the distance is how many bytes ago the text gave the answer away.
    """

    name: str
    content: Tensor
    distances: Tensor | None = None

    @classmethod
    def of(cls, name: str, content: bytes) -> Document:
        """A document of these bytes.

        >>> Document.of("greeting", b"hello").content.tolist()
        [104, 101, 108, 108, 111]
        """
        if not content:
            return cls(name, torch.zeros(0, dtype=torch.uint8))
        return cls(name, torch.frombuffer(bytearray(content), dtype=torch.uint8))

    def __len__(self) -> int:
        return self.content.numel()


@dataclass(frozen=True, eq=False)
class Batch:
    """One segment of every row, or of those that a rank owns.

    Attributes:
        tokens: (B, N) int64; zeros in the padding.
        labels: (B, N) int64, the byte after each token; NOT_SCORED in the padding and where nothing is asked.
        lengths: (B,) int64, real tokens of each row; the padding sits at the tail.
        fresh: (B,) bool, rows that begin a document with this segment.
        offsets: (B,) int64, where in its document each row's segment begins.
        distances: (B, N) int64 or None: how long ago each label was given away, 0 where it was not (`recall`).
        scored: labels that are scored in all rows of the stream, counted on the host.
        real: real tokens in all of them, counted on the host.
    """

    tokens: Tensor
    labels: Tensor
    lengths: Tensor
    fresh: Tensor
    offsets: Tensor
    distances: Tensor | None
    scored: int
    real: int

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; a copy from pinned memory does not wait."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        distances = None if self.distances is None else moved(self.distances)
        return Batch(
            moved(self.tokens),
            moved(self.labels),
            moved(self.lengths),
            moved(self.fresh),
            moved(self.offsets),
            distances,
            self.scored,
            self.real,
        )


class DocumentOrder(Protocol):
    """Which documents rows take, one after another; the same number always names the same document."""

    @property
    def count(self) -> int | None:
        """How many there are; None for no end."""

    def document(self, index: int) -> Document:
        """The document that is handed out as number `index`."""


def check_documents(documents: Sequence[Document]) -> Sequence[Document]:
    """Returns the documents, or raises ValueError: there must be some, and each must hold a token and a label."""
    if not documents:
        raise ValueError("documents must hold at least one document, got none")
    for document in documents:
        if len(document) < 2:
            raise ValueError(f"documents must have at least 2 bytes each, got {len(document)} in {document.name!r}")
    return documents


class InOrder:
    """Each document once, as they stand: for evaluation.

    >>> order = InOrder([Document.of("a", b"first"), Document.of("b", b"second")])
    >>> order.count, order.document(1).name
    (2, 'b')
    """

    def __init__(self, documents: Sequence[Document]) -> None:
        self.documents = check_documents(documents)

    @property
    def count(self) -> int | None:
        return len(self.documents)

    def document(self, index: int) -> Document:
        return self.documents[index]


class Shuffled:
    """All documents, over and over, each time in an order of its own that `seed` determines.

    >>> documents = [Document.of(str(number), b"text") for number in range(3)]
    >>> order = Shuffled(documents, seed=0)
    >>> sorted(order.document(index).name for index in range(3, 6))
    ['0', '1', '2']
    """

    def __init__(self, documents: Sequence[Document], seed: int) -> None:
        self.documents, self.seed = check_documents(documents), seed
        self._epoch, self._order = -1, list(range(len(documents)))

    @property
    def count(self) -> int | None:
        return None

    def document(self, index: int) -> Document:
        epoch, place = divmod(index, len(self.documents))
        if epoch != self._epoch:
            self._order = list(range(len(self.documents)))
            random.Random(f"epoch {self.seed} {epoch}").shuffle(self._order)
            self._epoch = epoch
        return self.documents[self._order[place]]


class RandomWindows:
    """Upstream's way: windows of `length` bytes from random places, each a document of its own.

    A place is drawn evenly over all bytes at which a whole window begins; a document shorter than a window is one
    window.

    >>> windows = RandomWindows([Document.of("digits", bytes(range(10)))], length=4, seed=0)
    >>> len(windows.document(7))
    4
    """

    def __init__(self, documents: Sequence[Document], length: int, seed: int) -> None:
        if length < 2:
            raise ValueError(f"length must be at least 2, got {length}")
        self.documents, self.length, self.seed = check_documents(documents), length, seed
        self._ends = list(accumulate(max(1, len(document) - length + 1) for document in documents))

    @property
    def count(self) -> int | None:
        return None

    def document(self, index: int) -> Document:
        place = random.Random(f"window {self.seed} {index}").randrange(self._ends[-1])
        chosen = bisect_right(self._ends, place)
        document = self.documents[chosen]
        start = place - (self._ends[chosen - 1] if chosen else 0)
        return Document(document.name, document.content[start : start + self.length])


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
        spans = [self._span(row) for row in self._rows]  # (length, scored) of each
        if not any(length for length, _ in spans):
            return None
        for place, b in enumerate(self.rows):
            _fill(self._rows[b].document, offsets[b], spans[b][0], tokens[place], labels[place], distances[place])
        asks = any(row.document is not None and row.document.distances is not None for row in self._rows)
        return Batch(
            tokens,
            labels,
            torch.tensor([spans[b][0] for b in self.rows], dtype=torch.int64, device="cpu"),
            torch.tensor([fresh[b] for b in self.rows], dtype=torch.bool, device="cpu"),
            torch.tensor([offsets[b] for b in self.rows], dtype=torch.int64, device="cpu"),
            distances if asks else None,
            scored=sum(scored for _, scored in spans),
            real=sum(length for length, _ in spans),
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

    def _span(self, row: _Row) -> tuple[int, int]:
        """Moves a row on by a segment; returns how many of its tokens are real, and how many of their labels scored."""
        if row.document is None:
            return 0, 0
        start, row.offset = row.offset, min(row.offset + self.segment, len(row.document) - 1)
        length = row.offset - start
        if row.document.distances is None:
            return length, length
        return length, int(row.document.distances[start : row.offset].count_nonzero())

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON can hold it."""
        return {"taken": self._taken, "rows": [[row.index, row.offset] for row in self._rows]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position that `state_dict` told. Raises ValueError when it is of another batch."""
        if len(state["rows"]) != self.batch:
            raise ValueError(f"state must hold {self.batch} rows, got {len(state['rows'])}")
        rows = [
            _Row(index, offset, self.order.document(index) if index >= 0 else None) for index, offset in state["rows"]
        ]
        for row in rows:
            if row.document is not None and not 0 <= row.offset < len(row.document):
                raise ValueError(f"state must hold places in documents of {len(row.document)} bytes, got {row.offset}")
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
