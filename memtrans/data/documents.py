"""Documents, and the orders in which the rows of a batch take them.

A token is a byte, or whatever the document's tokenizer makes one; byte 0 is a byte like any other.

`Corpus` (see `sources.py`) holds documents that exist; an *order* says which document a row takes next: `InOrder`,
`Shuffled`, `RandomWindows` cut from them (upstream's way), or `recall.RecallDocuments`, made on the fly.
`stream.DocumentStream` walks any of them.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memtrans.data.tokens import BYTES, Tokenizer

TOKENS_AT_ONCE = 1 << 20  # whose bytes are counted
UNEVEN = 0.25  # of a stretch's length: so much shorter than the average is the shortest, and longer the longest


@dataclass(frozen=True, eq=False)
class Document:
    """A text that is read from its first token to its last.

    Attributes:
        name: for messages and samples.
        content: (length,) uint8, uint16 or uint32; it may be a file that is mapped into memory.
        distances: (length,) int64 or None, of bytes. Where given, only the bytes *after* positions with a distance
            above 0 are scored; the distance is how many bytes ago the text gave the answer away.
        tokenizer: says which bytes a token stands for.
    """

    name: str
    content: Tensor
    distances: Tensor | None = None
    tokenizer: Tokenizer = BYTES

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

    def digest(self) -> bytes:
        """The SHA-256 of the tokens."""
        return hashlib.sha256(self.content.contiguous().view(torch.uint8).numpy().data).digest()

    def place(self, size: int) -> int:
        """How many tokens from the beginning have so many bytes, or less, together."""
        if self.tokenizer is BYTES:
            return min(size, len(self))
        behind = 0
        for start in range(0, len(self), TOKENS_AT_ONCE):
            ends = self.tokenizer.sizes[self.content[start : start + TOKENS_AT_ONCE].numpy()].cumsum()
            if behind + ends[-1] > size:
                return start + int((ends <= size - behind).sum())
            behind += int(ends[-1])
        return len(self)

    def part(self, name: str, start: int, end: int) -> Document:
        """The document that these tokens are by themselves, without a copy of them."""
        distances = None if self.distances is None else self.distances[start:end]
        return Document(name, self.content[start:end], distances, self.tokenizer)

    def text(self, start: int = 0, end: int | None = None) -> bytes:
        """The bytes that the tokens from `start` to `end` stand for.

        >>> Document.of("greeting", b"hello").text(1, 3)
        b'el'
        """
        return self.tokenizer.decode(self.content[start:end].numpy())

    def size(self, start: int, end: int) -> int:
        """How many bytes the tokens from `start` to `end` stand for."""
        if self.tokenizer is BYTES:
            return max(0, min(end, len(self)) - start)
        return int(self.tokenizer.sizes[self.content[start:end].numpy()].sum())


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
    if isinstance(documents, Chosen):
        return documents  # none shorter is chosen
    for document in documents:
        if len(document) < 2:
            raise ValueError(f"documents must have at least 2 bytes each, got {len(document)} in {document.name!r}")
    return documents


class Library(Protocol):
    """Documents that are made when they are asked for, and what can be known without making them.

    Attributes:
        sizes: bytes of each. lengths: tokens of each. digests: (documents, 32) uint8, the SHA-256 of the bytes of each.
        tokenizer: of all of them.
    """

    sizes: NDArray[np.int64]
    lengths: NDArray[np.int64]
    digests: NDArray[np.uint8]
    tokenizer: Tokenizer

    def name(self, index: int) -> str:
        """Of a document."""

    def document(self, index: int) -> Document:
        """One of them."""


def contents_of(digests: NDArray[np.uint8]) -> str:
    """Tells texts by their bytes alone, whatever their names and their order: the sum of their digests (documents, 32).

    >>> both = np.array([[7] * 32, [0] * 32], dtype=np.uint8)
    >>> contents_of(both) == contents_of(both[::-1]) != contents_of(both[:1] + 1)
    True
    """
    return np.ascontiguousarray(digests).view("<u8").sum(axis=0).astype("<u8").tobytes().hex()


class Chosen(Sequence[Document]):
    """Some of a library's documents, those with at least two tokens; each is made when it is asked for.

    library: of the documents. indices: (count,) which of them.
    """

    def __init__(self, library: Library, indices: NDArray[np.int64]) -> None:
        self.library, self.indices = library, indices[library.lengths[indices] >= 2]

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, place: int) -> Document: ...

    @overload
    def __getitem__(self, place: slice) -> Chosen: ...

    def __getitem__(self, place: int | slice) -> Document | Chosen:
        if isinstance(place, slice):
            return Chosen(self.library, self.indices[place])
        return self.library.document(int(self.indices[place]))

    def lengths(self) -> list[int]:
        """Tokens of each, without making them."""
        found: list[int] = self.library.lengths[self.indices].tolist()
        return found


def lengths_of(documents: Sequence[Document]) -> list[int]:
    """Tokens of each document."""
    return documents.lengths() if isinstance(documents, Chosen) else [len(document) for document in documents]


def stretches(documents: Sequence[Document], rows: int) -> list[Document]:
    """At least so many documents, by cutting the longest: each row of a batch then reads another text.

    A stretch begins with the last token of the one before it, which was only a label there, so that every token but a
    document's first is asked for. The stretches of a document differ in length: their rows do not all end at once.

    Returns fewer than `rows` where the documents have too few tokens for stretches of two.

    >>> [part.content.tolist() for part in stretches([Document.of("text", b"abcdef")], rows=2)]
    [[97, 98, 99], [99, 100, 101, 102]]
    """
    pieces = [1] * len(documents)
    longest = [(-len(document), place) for place, document in enumerate(documents)]
    heapq.heapify(longest)
    while sum(pieces) < rows and longest:
        _, place = heapq.heappop(longest)
        length = len(documents[place])
        if length // (pieces[place] + 1) >= 2:
            pieces[place] += 1
            heapq.heappush(longest, (-(length // pieces[place]), place))
    return [part for document, count in zip(documents, pieces, strict=True) for part in _cut(document, count)]


def _cut(document: Document, count: int) -> list[Document]:
    """A document in so many stretches, or the document itself where that is one."""
    if count == 1:
        return [document]
    length = len(document)
    uneven = UNEVEN if length // count >= 8 else 0.0  # shorter ones would have no two tokens
    weights = [1 + uneven * (2 * place / (count - 1) - 1) for place in range(count)]
    ends = [round(length * total / count) for total in accumulate(weights)]
    begins = [0, *(end - 1 for end in ends[:-1])]
    names = [f"{document.name} (stretch {number} of {count})" for number in range(1, count + 1)]
    return [document.part(name, begin, end) for name, begin, end in zip(names, begins, ends, strict=True)]


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
        self._ends = list(accumulate(max(1, tokens - length + 1) for tokens in lengths_of(documents)))

    @property
    def count(self) -> int | None:
        return None

    def document(self, index: int) -> Document:
        place = random.Random(f"window {self.seed} {index}").randrange(self._ends[-1])
        chosen = bisect_right(self._ends, place)
        document = self.documents[chosen]
        start = place - (self._ends[chosen - 1] if chosen else 0)
        return document.part(document.name, start, start + self.length)
