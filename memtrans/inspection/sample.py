"""A look at the memory at work in training: what the end of a held-out document looks up in its beginning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from memtrans.data.documents import Document, InOrder
from memtrans.data.stream import NOT_SCORED, Batch, DocumentStream
from memtrans.inspection.records import Records, Written
from memtrans.inspection.texts import texts_of_tokens
from memtrans.inspection.trace import Trace
from memtrans.layers import evaluating
from memtrans.memory.memory_list import KNNMemoryList
from memtrans.transformer import MemorizingTransformer

BEFORE, AFTER = 24, 8  # tokens shown on either side
PROMPT = 240  # tokens before, on the page
LONGEST = 16384  # tokens of the document that are read


class Sample(NamedTuple):
    """What was looked up for the last tokens of a document.

    Attributes:
        records: of all of them, for the page. asked: which of the written tokens are scored.
    """

    records: Records
    asked: tuple[int, ...]

    def lines(self, tokens: int) -> list[str]:
        """A few of the scored tokens, so many at most, in words."""
        chosen = self.asked[:: max(1, len(self.asked) // tokens)][:tokens] if tokens else ()
        return [described(self.records, self.records.written[place]) for place in chosen]


@torch.no_grad()
def sample_retrievals(
    model: MemorizingTransformer,
    documents: Sequence[Document],
    segment: int,
    read: Callable[[Batch], object],
    memories: KNNMemoryList,
    name: str = "the model",
) -> Sample | None:
    """What the memory layers retrieve in the last segments of the longest document, where its memory is fullest.

    Args:
        documents: the longest is read, at most 16384 tokens of it. segment: N. name: of the model.
        read: reads the next segment with the model. memories: that it reads into, of one document, empty yet.

    Returns:
        None where the model has no memory or the document ends with its first segment.
    """
    longest = max(documents, key=len)
    document = longest.part(longest.name, 0, LONGEST)
    segments = -(-(len(document) - 1) // segment)
    if not model.memorizing_layers or segments < 2:
        return None
    first = max(1, segments - 2)  # two: the last one may be too short to tell what is usual
    with evaluating(model):
        trace, asked = _read_to_the_end(model, document, segment, first, read, memories)
    texts = texts_of_tokens(document.text(), document.tokenizer.sizes[document.content.numpy()].tolist())
    begin = first * segment
    shift, count = model.shift_knn_memories_down, model.num_memory_layers
    names = {place: f"layer {model.memorizing_layers[(place - shift) % count]}" for place in range(count)}
    written = [Written(text, place) for place, text in enumerate(texts[begin + 1 :])]
    prompt = "".join(texts[max(0, begin + 1 - PROMPT) : begin + 1])
    return Sample(Records(trace, 0, texts, prompt, written, names, document.name, name), tuple(asked))


def _read_to_the_end(
    model: MemorizingTransformer,
    document: Document,
    segment: int,
    first: int,
    read: Callable[[Batch], object],
    memories: KNNMemoryList,
) -> tuple[Trace, list[int]]:
    """Reads every segment, from the first one that is wanted traced; returns the trace and the queries asked in it."""
    stream = DocumentStream(InOrder([document]), batch=1, segment=segment)
    batches: list[Batch] = list(stream)
    for batch in batches[:first]:
        read(batch.to(model.device))
    asked = list[int]()
    with memories.tracing() as trace:
        for number, batch in enumerate(batches[first:]):
            read(batch.to(model.device))
            asked += [
                number * segment + place for place in (batch.labels[0] != NOT_SCORED).nonzero().flatten().tolist()
            ]
    return trace, asked


def described(records: Records, token: Written) -> str:
    """A written token and where most of it came from, in a line."""
    place = len(records.document) - len(records.written) + records.written.index(token)
    share = f"{records.from_memory[token.query]:.0%} of the weight came from the memory"
    said = f"{_shown(records, place)} was written: {share}"
    own = records.shares.of(token.query)
    best = own.best(1)
    if not best:
        return said
    position, lift = int(own.position[best[0]]), float(own.lift[best[0]])
    return f"{said}, {lift:.0%} from {_shown(records, position)}, {place - position} tokens before"


def _shown(records: Records, place: int) -> str:
    """A token in brackets amid the text around it, on one line."""
    texts: Any = records.document
    before, after = texts[max(0, place - BEFORE) : place], texts[place + 1 : place + 1 + AFTER]
    left, token, right = (repr("".join(part))[1:-1] for part in (before, texts[place], after))
    return f'"{left}[{token}]{right}"'
