"""What the queries of some forward passes found in the memory, and how much weight it had.

Shapes: Q queries of a row, in the order in which they were read; the other letters are those of `memtrans_kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from memtrans.inspection.background import Shares, shares_of
from memtrans.inspection.passages import Passage, passages_of
from memtrans.memory.observation import Observation
from memtrans_kernels import checks


class Citation(NamedTuple):
    """A place of the document that a query looked up.

    Attributes:
        position: of the token, counted in the document. share: of the query's weight, a mean over layers and heads.
        background: the same of each head's median over all queries. token: its id; None where ids are not kept.
    """

    position: int
    share: float
    background: float
    token: int | None


class Cited(NamedTuple):
    """What one query looked up.

    Attributes:
        share: of its weight that came from the memory. best: what stands out above its background, most of it first.
        usual: what most queries look up as much, largest share first.
    """

    share: float
    best: tuple[Citation, ...]
    usual: tuple[Citation, ...]


class Trace:
    """What was retrieved while a memory was traced; `KNNMemoryList.tracing` and `memtrans.hf`'s memory make it.

    A weight is exp(scale · score + offset - lse): what attention gave to the entry, in its one softmax over retrieved
    and local keys; with a gate, its part of the mixture. So the weights of a query's entries and local keys add up to
    1. They are those before dropout.

    A row is a document of the memory, or of the batch where several rows look at one. Its queries are counted through
    all passes, padding included. Layers are numbered as in the memory: from 0; in `memtrans.hf` as in the model. A
    memory that was loaded without the ids of its entries counts positions from the oldest it holds.

    >>> from memtrans import MemorizingTransformer
    >>> model = MemorizingTransformer(num_tokens=50, dim=32, depth=2, dim_head=8, heads=4, memorizing_layers=2).eval()
    >>> memories = model.create_knn_memories(batch_size=1)
    >>> with torch.no_grad():
    ...     logits = model(torch.arange(40)[None], memories)
    >>> with memories.tracing() as trace, torch.no_grad():
    ...     logits = model(torch.tensor([[7, 8, 9, 10]]), memories)
    >>> cited = trace.citations(row=0, top=1)
    >>> [(len(of_query.best), of_query.best[0].position < 40) for of_query in cited]
    [(1, True), (1, True), (1, True), (1, True)]
    >>> trace.positions(0, layer=0).shape, [passage.end <= 40 for passage in trace.passages(row=0, top=1)]
    (torch.Size([4, 4, 32]), [True])
    """

    def __init__(self) -> None:
        self._seen: dict[int, list[Observation]] = {}
        self._shares: dict[tuple[int, int | None, int | None, int], Shares] = {}  # by row, layer, head and passes seen

    def watcher(self, layer: int) -> Callable[[Observation], None]:
        """What a layer's memory tells what it sees."""
        self._seen[layer] = []
        return partial(self._see, layer)

    def _see(self, layer: int, observation: Observation) -> None:
        self._seen[layer].append(observation)

    # ------------------------------------------------------------------------------------------------------ as it was

    @property
    def layers(self) -> list[int]:
        """The layers that were traced."""
        return list(self._seen)

    def positions(self, row: int, layer: int) -> Tensor:
        """Where each entry stood in its document (H, Q, K) int64, -1 for none; on the CPU, as all that follows."""
        return self._joined(row, layer, "positions", -1)

    def weights(self, row: int, layer: int) -> Tensor:
        """The weight of each entry (H, Q, K)."""
        return self._joined(row, layer, "weights", 0)

    def local_weights(self, row: int, layer: int) -> list[Tensor]:
        """The weights of the local keys (H, N, L) in each pass. Raises ValueError unless traced with local=True."""
        found = [part.local for part in self._of_row(row, layer)]
        kept = [local.cpu() for local in found if local is not None]
        if len(kept) < len(found):
            raise ValueError("local must be True in tracing() for local weights to be kept, got False")
        return kept

    def tokens(self, row: int) -> dict[int, int]:
        """The ids of the tokens that were retrieved, by position; empty where ids are not kept."""
        found: dict[int, int] = {}
        for layer in self.layers:
            for part in self._of_row(row, layer):
                if part.tokens is not None:
                    at, ids = part.positions.flatten().cpu(), part.tokens.flatten().cpu()
                    there = at >= 0
                    found |= dict(zip(at[there].tolist(), ids[there].tolist(), strict=True))
        return found

    def _of_row(self, row: int, layer: int) -> list[Observation]:
        """The passes in which a row took part, each without the others; raises ValueError where there is none."""
        if layer not in self._seen:
            raise ValueError(f"layer must be one that was traced, {self.layers}, got {layer}")
        found = []
        for seen in self._seen[layer]:
            at = (seen.documents == row).nonzero().flatten()
            if len(at) > 1:
                raise ValueError(f"row must stand once in a pass, got row {row} in {len(at)} places")
            if len(at):
                place = int(at)
                local, tokens = (None if x is None else x[place] for x in (seen.local, seen.tokens))
                own = Observation(seen.documents[at], seen.positions[place], seen.weights[place], local, tokens)
                found.append(own)
        if not found:
            raise ValueError(f"row must be one that was read while the memory was traced, got {row}")
        return found

    def _joined(self, row: int, layer: int, name: str, filler: int) -> Tensor:
        parts = [getattr(part, name).cpu() for part in self._of_row(row, layer)]
        most = max(part.shape[2] for part in parts)
        return torch.cat([pad(part, (0, most - part.shape[2]), value=filler) for part in parts], dim=1)

    # ------------------------------------------------------------------------------------------------------ in the eye

    def memory_share(self, row: int) -> Tensor:
        """How much of each query's weight came from the memory (Q,) float64, a mean over layers and heads."""
        return torch.stack([self.weights(row, layer).double().sum(-1).mean(0) for layer in self.layers]).mean(0)

    def shares(self, row: int, layer: int | None = None, head: int | None = None) -> Shares:
        """How much of each query's weight each place of the document had.

        layer, head: of one alone. Default: a mean over all of them.

        Raises ValueError where the row or the layer was not traced, or there is no such head.
        """
        layers = self.layers if layer is None else [layer]
        if head is not None:
            _check_among("head", head, self.weights(row, layers[0]).shape[0])
        heads = slice(None) if head is None else slice(head, head + 1)
        key = (row, layer, head, sum(map(len, self._seen.values())))
        if key not in self._shares:
            parts = [(self.positions(row, at)[heads], self.weights(row, at)[heads]) for at in layers]
            self._shares[key] = shares_of(parts)
        return self._shares[key]

    def citations(self, row: int, top: int = 16, *, layer: int | None = None, head: int | None = None) -> list[Cited]:
        """What each query of a row looked up.

        Args:
            row: the document. top: so many places at most, of what stands out and of what is usual.
            layer, head: of one alone. Default: all together.

        Raises ValueError where the row or the layer was not traced, there is no such head, or top is negative.
        """
        checks.integer("top", top, low=0)
        shares, tokens = self.shares(row, layer, head), self.tokens(row)
        cited = []
        for query in range(shares.queries):
            own = shares.of(query)
            rows = list(zip(own.position.tolist(), own.share.tolist(), own.background.tolist(), strict=True))
            best, usual = (
                tuple(Citation(*rows[place], tokens.get(rows[place][0])) for place in places)
                for places in (own.best(top), own.usual(top))
            )
            cited.append(Cited(float(own.share.sum()), best, usual))
        return cited

    def passages(self, row: int, top: int = 5, *, queries: Sequence[int] | None = None) -> list[Passage]:
        """The passages of the document that a row's queries looked up, with their share of the weight.

        Args:
            row: the document. top: so many at most, largest share first.
            queries: which of them. Default: all; the share is a mean over them.

        Raises ValueError where the row was not traced, there is no such query, or top is negative.
        """
        checks.integer("top", top, low=0)
        shares = self.shares(row)
        chosen = range(shares.queries) if queries is None else queries
        for query in chosen:
            _check_among("a query of queries", query, shares.queries)
        own = shares.among(chosen).standing_out()
        return passages_of(own.position, own.lift / max(1, len(chosen)), own.score, top)


def _check_among(name: str, number: int, count: int) -> None:
    """Raises ValueError unless a number counts one of so many, from 0."""
    if not 0 <= checks.integer(name, number) < count:
        raise ValueError(f"{name} must be in [0, {count}), got {number}")
