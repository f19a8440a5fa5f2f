"""Documents, and the orders in which the rows of a batch take them.

A token is a byte; byte 0 is a byte like any other.

`Corpus` (see `sources.py`) holds documents that exist; an *order* says which document a row takes next: `InOrder`,
`Shuffled`, `RandomWindows` cut from them (upstream's way), or `recall.RecallDocuments`, made on the fly.
`stream.DocumentStream` walks any of them.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor


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
