"""Lessons of a calibration: pieces of a text with facts planted in them, and what is asked of them.

Shapes: B documents, N tokens of a segment, Q questions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memtrans.hf.facts import Words, facts
from memtrans.hf.model_memory import ModelMemory
from memtrans.hf.planted import BEHIND_A_STOP, Planted, Questions, passages, plant, questions
from memtrans_kernels import checks

SIZES = (4096, 16384, 65536, 262144)
SEGMENTS = 8  # of running text behind a document
FEWEST = 64  # tokens of all documents together
ASKED = 32  # questions of a document in a step
SPARE = 2  # tokens of a question's row, for what stands before it
FACTS = 256  # of a piece: a step on those that were asked before teaches little
MEASURED = 400  # facts at least, of every template
ALIKE = 8  # facts that say the same of different places, in every other document


class Drawn(NamedTuple):
    """What each of E steps of a lesson is about.

    Attributes:
        rows: (E, Q), of the lesson's questions. places: (E,), of the lesson's segments. sizes: (E,), entries that are
            seen. behind: (E,), entries that were stored since the segment that is read again.
    """

    rows: Tensor
    places: Tensor
    sizes: Tensor
    behind: Tensor


@dataclass(frozen=True)
class Lesson:
    """B documents with facts in them, and the running text behind each.

    Attributes:
        ids: (B, tokens). behind: (B, SEGMENTS, N). bank: questions (B * F, N) about each document's facts, and
            some whose answer is how a passage goes on. distances: (B * F,), tokens from where each begins to the end.
        facts: how many of the F questions of a document are of facts; they come first.
        segments: (B, S, N), those of the documents, and the one behind them. stored: (S,), entries that each document
            has got since each of them began.
    """

    ids: Tensor
    behind: Tensor
    bank: Questions
    distances: Tensor
    facts: int
    segments: Tensor
    stored: Tensor

    def to(self, device: torch.device) -> Lesson:
        """The same on a device; what is drawn by stays on the host."""
        moved = {name: getattr(self, name).to(device) for name in ("ids", "behind", "bank", "segments")}
        return replace(self, **moved)

    @property
    def documents(self) -> int:
        """B."""
        return self.ids.shape[0]

    def known(self, size: int, passages: bool = False) -> list[list[int]]:
        """The rows of the questions about facts, or passages, within the last so many tokens of each document."""
        each = self.distances.numel() // self.documents
        some = range(self.facts, each) if passages else range(self.facts)
        near = (self.distances <= size).tolist()
        return [[row * each + at for at in some if near[row * each + at]] for row in range(self.documents)]

    def rounds(self, size: int, asked: int) -> int:
        """How many times so many questions of a size are asked until every fact within it was."""
        return max(1, min(map(len, self.known(size))) * self.documents // asked)

    def asked(self, size: int, asked: int, place: int) -> Questions:
        """So many questions (Q, N) about the facts within a size: those of that place in turn, documents in order."""
        each = asked // self.documents
        rows = [known[(place * each + at) % len(known)] for known in self.known(size) for at in range(each)]
        return self.bank.rows(torch.tensor(rows, device=self.ids.device))

    def draw(self, steps: int, asked: int, sizes: Sequence[int], seed: int) -> Drawn:
        """What so many steps are about: each size as often as another, and a quarter of the questions of passages."""
        draw, each = random.Random(seed), asked // self.documents
        stored = self.stored.tolist()
        chosen = list(islice(_shuffled(sizes, draw), steps))
        decks = {size: self._decks(size, draw) for size in sizes}
        rows, places = [], []
        for size in chosen:
            drawn: list[int] = []
            for of_facts, of_passages in decks[size]:
                some = list(islice(of_passages, each // 4))
                drawn += [*some, *islice(of_facts, each - len(some))]
            rows.append(drawn)
            enough = 0.75 * min(size, stored[0])
            places.append(draw.choice([at for at, since in enumerate(stored) if stored[0] - since >= enough]))
        at = torch.tensor(places)
        return Drawn(torch.tensor(rows), at, torch.tensor(chosen), self.stored[at])

    def _decks(self, size: int, draw: random.Random) -> list[tuple[Iterator[int], Iterator[int]]]:
        """Each document's questions of facts and of passages within a size, without end; none again before all were."""
        both = zip(self.known(size), self.known(size, passages=True), strict=True)
        return [(_shuffled(of_facts, draw), _shuffled(of_passages, draw)) for of_facts, of_passages in both]


@dataclass(frozen=True)
class Course:
    """What lessons are made from.

    Attributes:
        ids: of the whole text. sizes: of the memory. length: N. facts: of a document. batch: B.
        asked: questions of a step. width: tokens of a question's row. reads: tokens of a segment that is read, of which
        the first `sink` are not stored. words: what facts are of.
    """

    ids: Sequence[int]
    sizes: tuple[int, ...]
    length: int
    facts: int
    batch: int
    asked: int
    encode: Callable[[str], list[int]]
    width: int
    reads: int
    sink: int
    words: Words

    @staticmethod
    def of(
        memory: ModelMemory,
        tokenizer: Any,
        documents: Sequence[str],
        sizes: Sequence[int] | None,
        count: int | None,
        batch: int,
        words: Words | None = None,
    ) -> Course:
        """Raises ValueError or TypeError for too little text, sizes that do not fit, or words of too few places.

        count: of facts; see `calibrate`.
        """

        def encode(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        words = Words() if words is None else words
        if not isinstance(words, Words):
            raise TypeError(f"words must be memtrans.hf.Words, got {type(words).__name__}")
        if isinstance(documents, str):
            raise TypeError("documents must be texts in a list, got one text")
        ids = [token for document in documents for token in encode(document)]
        if len(ids) < FEWEST:
            raise ValueError(f"documents must have at least {FEWEST} tokens, got {len(ids)}")
        length = min(memory.settings.segment, len(ids) // 4 // SEGMENTS)
        chosen = _sizes(sizes, len(ids) - SEGMENTS * length, memory.settings.max_memories)
        measured = min(max(MEASURED, len(words.templates)), words.room)
        longest = max(len(encode(fact.sentence)) for fact in facts(measured, 0, words))
        if chosen[0] < longest:
            raise ValueError(f"sizes must have room for a fact of {longest} tokens, got {chosen[0]}")
        most = max(1, chosen[0] // (2 * longest))  # half of a text may be facts
        wanted = min(FACTS, words.room) if count is None else count
        count = min(max(wanted, len(chosen)), most * len(chosen))
        if count > words.room:
            raise ValueError(
                f"words must have places for the {count} facts of a piece, got syllables of {words.room} places"
            )
        return Course(
            ids, chosen, length, count, batch, ASKED * batch, encode, longest + SPARE,
            memory.settings.segment, memory.settings.sink, words,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """Of a document and what is behind it."""
        return self.sizes[-1] + SEGMENTS * self.length

    def lesson(self, seed: int, begin: int | None = None) -> Lesson:
        """Pieces of the text, all from one place or each from its own, with facts of that seed.

        What begins at the end of the text is not drawn where there is other text.
        """
        draw = random.Random(seed)
        latest = len(self.ids) - 2 * self.tokens
        planted, behind, banks = [], [], []
        size = self.sizes[-1]
        for row in range(self.batch):
            at = draw.randint(0, max(0, latest)) if begin is None else begin
            piece = self.ids[at : at + self.tokens]
            made = facts(self.facts, self.batch * seed + row, self.words, alike=(1, ALIKE)[(seed + row) % 2])
            document = plant(piece[:size], made, self.sizes, self.encode)
            planted.append(document)
            behind.append(torch.tensor(piece[size:], dtype=torch.int64).view(SEGMENTS, self.length))
            banks.append(self._bank(document, draw))
        ids, after = torch.cat([document.ids[:, -size:] for document in planted]), torch.stack(behind)
        distances = torch.tensor([distance for of_one, _ in banks for distance in of_one])
        segments, stored = self._segments(ids, after)
        bank = Questions(*(torch.cat(parts) for parts in zip(*((q.ids, q.answers) for _, q in banks), strict=True)))
        return Lesson(ids, after, bank, distances, self.facts, segments, stored)

    def _bank(self, document: Planted, draw: random.Random) -> tuple[list[int], Questions]:
        """The questions about a document, of facts and then of passages, and how far before its end each begins."""
        asked = questions([fact for _, fact in document.facts], self.encode, self.width, ("", BEHIND_A_STOP))
        distances = [distance for distance, _ in document.facts]
        ids = document.ids[0, -self.sizes[-1] :]
        low, places = 0, []
        for high in self.sizes:  # as facts, equally many within each size and beyond the one before it
            places += [draw.randint(min(low + self.width, high), high) for _ in range(self.facts // len(self.sizes))]
            low = high
        of_passages = passages(ids, places, self.width, draw)
        both = Questions(torch.cat((asked.ids, of_passages.ids)), torch.cat((asked.answers, of_passages.answers)))
        return distances + places, both

    def _segments(self, ids: Tensor, behind: Tensor) -> tuple[Tensor, Tensor]:
        """The whole segments of documents (B, tokens) and the first one behind them; see `Lesson`."""
        tokens, whole = ids.shape[1], ids.shape[1] // self.reads
        parts = ids[:, : whole * self.reads].view(len(ids), whole, self.reads)[..., : self.length]
        rest = max(0, tokens - whole * self.reads - self.sink)
        stored = [(whole - at) * (self.reads - self.sink) + rest for at in range(whole)]
        return torch.cat((parts, behind[:, :1]), 1), torch.tensor([*stored, 0])


def _shuffled(numbers: Sequence[int], draw: random.Random) -> Iterator[int]:
    """All of them in an order by chance, again and again."""
    while numbers:
        yield from draw.sample(numbers, len(numbers))


def _sizes(asked: Sequence[int] | None, tokens: int, most: int) -> tuple[int, ...]:
    if asked is None:
        fitting = tuple(size for size in SIZES if size <= min(tokens, most))
        return fitting or (min(tokens, most),)
    if not isinstance(asked, Sequence):
        raise TypeError(f"sizes must be numbers in a list, got {asked!r}")
    sizes = tuple(sorted(checks.integer("sizes", size, low=1) for size in asked))
    if not sizes or sizes[-1] > min(tokens, most):
        raise ValueError(
            f"sizes must be numbers of entries up to max_memories={most} and the {tokens} tokens of the documents, "
            f"got {list(sizes)}"
        )
    return sizes
