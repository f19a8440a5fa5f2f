"""Lessons of a calibration: pieces of a text with facts planted in them, and what is asked of them.

Shapes: B documents, N tokens of a segment, Q questions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memtrans.hf.facts import Fact, facts
from memtrans.hf.model_memory import ModelMemory
from memtrans.hf.planted import Planted, Questions, plant, questions
from memtrans_kernels import checks

SIZES = (4096, 16384, 65536, 262144)
SEGMENTS = 8  # of running text behind a document
FEWEST = 64  # tokens of all documents together
ASKED = 32  # questions of a step


@dataclass(frozen=True)
class Lesson:
    """B documents with facts in them, and the running text behind each.

    Attributes:
        ids: (B, tokens). behind: (B, SEGMENTS, N). documents: with their facts. width: tokens of a question's row.
    """

    ids: Tensor
    behind: Tensor
    documents: tuple[Planted, ...]
    encode: Callable[[str], list[int]]
    width: int

    def to(self, device: torch.device) -> Lesson:
        """The same on a device."""
        return Lesson(self.ids.to(device), self.behind.to(device), self.documents, self.encode, self.width)

    def rounds(self, size: int, asked: int) -> int:
        """How many times so many questions of a size are asked until every fact within it was."""
        known = min(len(document.within(size)) for document in self.documents)
        return max(1, known * len(self.documents) // asked)

    def asked(self, size: int, asked: int, place: int) -> Questions:
        """So many questions (Q, N) about the facts within a size: those of that place in turn, documents in order."""
        each = asked // len(self.documents)
        chosen: list[Fact] = []
        for document in self.documents:
            known = document.within(size)
            chosen += [known[(place * each + number) % len(known)] for number in range(each)]
        return questions(chosen, self.encode, self.width).to(self.ids.device)


@dataclass(frozen=True)
class Course:
    """What lessons are made from.

    Attributes:
        ids: of the whole text. sizes: of the memory. length: N. facts: of a document. batch: B.
        asked: questions of a step. width: tokens of a question's row.
    """

    ids: Sequence[int]
    sizes: tuple[int, ...]
    length: int
    facts: int
    batch: int
    asked: int
    encode: Callable[[str], list[int]]
    width: int

    @staticmethod
    def of(
        memory: ModelMemory,
        tokenizer: Any,
        documents: Sequence[str],
        sizes: Sequence[int] | None,
        count: int,
        batch: int,
    ) -> Course:
        """Raises ValueError for too little text or sizes that do not fit."""

        def encode(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        ids = [token for document in documents for token in encode(document)]
        if len(ids) < FEWEST:
            raise ValueError(f"documents must have at least {FEWEST} tokens, got {len(ids)}")
        length = min(memory.settings.segment, len(ids) // 4 // SEGMENTS)
        chosen = _sizes(sizes, len(ids) - SEGMENTS * length, memory.settings.max_memories)
        count = max(count, len(chosen))
        longest = max(len(encode(fact.sentence)) for fact in facts(400, 0))
        if chosen[0] < longest:
            raise ValueError(f"sizes must have room for a fact of {longest} tokens, got {chosen[0]}")
        return Course(ids, chosen, length, count, batch, max(1, ASKED // batch) * batch, encode, longest + 8)

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
        planted, behind = [], []
        for row in range(self.batch):
            at = draw.randint(0, max(0, latest)) if begin is None else begin
            size, piece = self.sizes[-1], self.ids[at : at + self.tokens]
            made = facts(self.facts, self.batch * seed + row)
            planted.append(plant(piece[:size], made, self.sizes, self.encode))
            behind.append(torch.tensor(piece[size:], dtype=torch.int64).view(SEGMENTS, self.length))
        ids = torch.cat([document.ids for document in planted])
        return Lesson(ids, torch.stack(behind), tuple(planted), self.encode, self.width)


def _sizes(asked: Sequence[int] | None, tokens: int, most: int) -> tuple[int, ...]:
    if asked is None:
        fitting = tuple(size for size in SIZES if size <= min(tokens, most))
        return fitting or (min(tokens, most),)
    sizes = tuple(sorted(checks.integer("sizes", size, low=1) for size in asked))
    if not sizes or sizes[-1] > min(tokens, most):
        raise ValueError(
            f"sizes must be numbers of entries up to max_memories={most} and the {tokens} tokens of the documents, "
            f"got {list(sizes)}"
        )
    return sizes
