"""What a model wrote, with what it looked up for each token: the records of the page, of `--json` and of `train`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from memtrans.inspection.background import Shares
from memtrans.inspection.passages import Passage, passages_of
from memtrans.inspection.trace import Trace

PASSAGES = 3  # of a token


@dataclass(frozen=True)
class Written:
    """A token that a model wrote, or would have, and the query that it came from.

    Attributes:
        text: as it is read. query: counted in the trace; the token before this one asked it.
    """

    text: str
    query: int


@dataclass(frozen=True)
class Records:
    """A document, what was written behind it, and what was looked up.

    Attributes:
        trace: of the queries. row: whose they are.
        document: the text of each token, by the position that the trace has for it.
        prompt: what was given to be continued.
        written: the tokens behind it.
        names: of the trace's layers, as a reader knows them. Default: their numbers.
        source: what the document is called. model: what the model is called.
    """

    trace: Trace
    row: int
    document: Sequence[str]
    prompt: str
    written: Sequence[Written]
    names: Mapping[int, str]
    source: str
    model: str

    @cached_property
    def shares(self) -> Shares:
        """Of all layers and heads together."""
        return self.trace.shares(self.row)

    @cached_property
    def from_memory(self) -> list[float]:
        """How much of each query's weight came from the memory."""
        return self.trace.memory_share(self.row).tolist()

    def passages(self, token: Written, top: int = PASSAGES) -> list[Passage]:
        """Those that a token came from, largest share first; not those that have next to nothing of it."""
        own = self.shares.of(token.query).standing_out()
        return passages_of(own.position, own.lift, own.score, top)

    def usual(self, token: Written, top: int) -> list[tuple[int, float]]:
        """Position and share of entries that most queries look up as much."""
        own = self.shares.of(token.query)
        return [(int(own.position[place]), float(own.share[place])) for place in own.usual(top)]

    def around(self, begin: int, end: int, before: int, after: int | None = None) -> range:
        """The positions from `before` tokens in front of a passage to as many, or `after`, behind it."""
        behind = before if after is None else after
        return range(max(0, begin - before), min(len(self.document), end + behind))


def to_json(records: Records) -> dict[str, Any]:
    """Everything: of each written token, layer and head all positions and weights, best first."""
    trace, row = records.trace, records.row
    columns = {layer: (trace.positions(row, layer), trace.weights(row, layer)) for layer in trace.layers}
    return {
        "model": records.model,
        "document": records.source,
        "document_tokens": len(records.document),
        "prompt": records.prompt,
        "written": [
            {
                "text": token.text,
                "share_from_memory": round(records.from_memory[token.query], 6),
                "passages": [
                    {
                        "begin": passage.begin,
                        "end": passage.end,
                        "share": round(passage.share, 6),
                        "text": text_of(records, range(passage.begin, passage.end)),
                    }
                    for passage in records.passages(token)
                ],
                "layers": {
                    records.names.get(layer, str(layer)): _heads(positions[:, token.query], weights[:, token.query])
                    for layer, (positions, weights) in columns.items()
                },
            }
            for token in records.written
        ],
    }


def text_of(records: Records, positions: Iterable[int]) -> str:
    """The text of some tokens of the document."""
    return "".join(records.document[position] for position in positions if position < len(records.document))


def _heads(positions: Tensor, weights: Tensor) -> list[list[list[float]]]:
    """For each head pairs of a position and a weight, of (H, K) each."""
    return [
        [[place, round(weight, 6)] for place, weight in zip(*of_head, strict=True) if place >= 0]
        for of_head in zip(positions.tolist(), weights.tolist(), strict=True)
    ]
