"""A look at the memory at work: the text around a few tokens and around what the memory retrieved for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memtrans.data.documents import Document, InOrder
from memtrans.data.stream import NOT_SCORED, Batch, DocumentStream
from memtrans.knn_attention import KNNAttention
from memtrans.transformer import MemorizingTransformer
from memtrans_kernels import cosine

BEFORE, AFTER = 24, 8  # bytes shown on either side
LONGEST = 16384  # bytes of the document that are read


@dataclass(frozen=True)
class Retrieved:
    """The nearest entry of a token: its place in the document, the cosine, and the texts around both."""

    place: int
    neighbour: int
    cosine: float
    query_text: str
    neighbour_text: str

    def __str__(self) -> str:
        distance = self.place - self.neighbour
        return f"{self.query_text}\n  retrieved {self.neighbour_text}  ({distance} bytes ago, cosine {self.cosine:.2f})"


class _Spy:
    """Keeps the nearest entry of each query of a memory layer: places of entries and scores, (H, N) each.

    A document that is read from its beginning into an empty memory stores its token at place i as entry i, so an
    entry's number is the place of the text that it came from.
    """

    def __init__(self) -> None:
        self.entries: Tensor | None = None
        self.scores: Tensor | None = None

    def __call__(self, attention: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        assert isinstance(attention, KNNAttention)
        snapshot = keywords["knn_memory"]
        query, _ = cosine(*attention.project(arguments[0])[:2])
        scores, slots = snapshot.nearest(query, 1)
        newest = snapshot.cursor[0] - 1
        self.entries = newest - (newest - slots[0, :, :, 0]) % snapshot.ring.keys.shape[1]
        self.scores = scores[0, :, :, 0]


@torch.no_grad()
def sample_retrievals(
    model: MemorizingTransformer,
    documents: Sequence[Document],
    segment: int,
    tokens: int,
    read: Callable[[Batch], object],
) -> list[Retrieved]:
    """What the first memory layer retrieves for a few tokens of the longest document, where its memory is fullest.

    Args:
        documents: the longest is read, at most 16384 bytes of it. segment: N. tokens: how many to show.
        read: reads the next segment with the model, into memories that begin empty.

    Returns:
        One for each token; none where none is wanted, the model has no memory or the document ends with its first
        segment.
    """
    if tokens < 1 or not model.memorizing_layers:
        return []
    longest = max(documents, key=len)
    distances = None if longest.distances is None else longest.distances[:LONGEST]
    document = Document(longest.name, longest.content[:LONGEST], distances)
    spy = _Spy()
    attention = next(module for module in model.modules() if isinstance(module, KNNAttention))
    handle = attention.register_forward_pre_hook(spy, with_kwargs=True)
    was_training = model.training
    model.eval()
    try:
        place, asked = _read_to_the_end(model, document, segment, read)
    finally:
        handle.remove()
        model.train(was_training)
    if spy.entries is None or spy.scores is None or place == 0:
        return []
    best = spy.scores.max(dim=0)
    entries = spy.entries.gather(0, best.indices[None])[0].tolist()
    scores = best.values.tolist()
    chosen = asked[:: max(1, len(asked) // tokens)][:tokens]
    return [_show(document, place + token, entries[token], scores[token]) for token in chosen]


def _read_to_the_end(
    model: MemorizingTransformer, document: Document, segment: int, read: Callable[[Batch], object]
) -> tuple[int, list[int]]:
    """Reads every segment; returns where the last one begins and its scored tokens."""
    stream = DocumentStream(InOrder([document]), batch=1, segment=segment)
    begin, asked = 0, list[int]()
    for number, batch in enumerate(stream):
        read(batch.to(model.device))
        begin, asked = number * segment, (batch.labels[0] != NOT_SCORED).nonzero().flatten().tolist()
    return begin, asked


def _show(document: Document, place: int, neighbour: int, score: float) -> Retrieved:
    return Retrieved(place, neighbour, score, _around(document, place), _around(document, neighbour))


def _around(document: Document, place: int) -> str:
    """The text before and at a place, a mark, and what follows, on one line."""
    before = bytes(document.content[max(0, place + 1 - BEFORE) : place + 1].tolist())
    after = bytes(document.content[place + 1 : place + 1 + AFTER].tolist())
    left, right = (repr(part.decode(errors="replace"))[1:-1] for part in (before, after))
    return f"[{left:>{BEFORE}} | {right}]"
