"""A document with facts planted in it, at depths that serve every size of memory, and what is asked of it.

Shapes: Q questions, N tokens, T tokens of running text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from memtrans.hf.facts import Fact

FAR = 64  # tokens that a fact moves at most to stand behind a sentence
GOES_ON = 4  # tokens of a passage's answer
BEHIND_A_STOP = ". "  # a question's first token, which looks at no memory, is then none of its words
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Planted:
    """A document and its facts.

    Attributes:
        ids: (1, tokens), the document. facts: each with how many tokens before the document's end it begins.
    """

    ids: Tensor
    facts: tuple[tuple[int, Fact], ...]

    def within(self, tokens: int) -> list[Fact]:
        """The facts that stand in the last so many tokens."""
        return [fact for distance, fact in self.facts if distance <= tokens]


def plant(text: Sequence[int], facts: Sequence[Fact], sizes: Sequence[int], encode: Encode) -> Planted:
    """Plants facts in the last of a text's tokens: equally many within each size and beyond the one before it.

    They stand behind the end of a sentence where one is near: amid a sentence an untrained model takes them for noise.
    The document has as many tokens as the largest size asks for.
    """
    sentences = [encode(fact.sentence) for fact in facts]
    end = encode("It ended.")[-1]
    wanted = _distances(len(facts), sorted(sizes))
    pieces: list[list[int]] = []
    distance, left, placed = 0, list(text), []
    for fact, sentence, want in zip(facts, sentences, wanted, strict=True):  # from the end of the document on
        between = max(0, min(want - distance - len(sentence), len(left)))
        between -= _to_end_of_sentence(left[len(left) - between :], end)
        pieces.append(left[len(left) - between :])
        left = left[: len(left) - between]
        pieces.append(sentence)
        distance += between + len(sentence)
        placed.append((distance, fact))
    pieces.append(left[max(0, len(left) - max(0, max(sizes) - distance)) :])
    ids = [token for piece in reversed(pieces) for token in piece]
    return Planted(torch.tensor([ids], dtype=torch.int64), tuple(placed))


def _to_end_of_sentence(tokens: Sequence[int], end: int) -> int:
    """After how many of these tokens a sentence ends; 0 where none does soon."""
    near = list(tokens[:FAR])
    return near.index(end) + 1 if end in near else 0


def _distances(count: int, sizes: Sequence[int]) -> list[int]:
    """Where facts are to begin, as distances from the end, rising."""
    wanted = []
    for index, (low, high) in enumerate(zip((0, *sizes[:-1]), sizes, strict=True)):
        here = count // len(sizes) + (index < count % len(sizes))
        wanted += [low + (place + 1) * (high - low) // (here + 1) for place in range(here)]
    return wanted


@dataclass(frozen=True)
class Questions:
    """Questions with their answers behind them.

    Attributes:
        ids: (Q, N), padded at the end. answers: (Q, N) bool, which of them are an answer's.
    """

    ids: Tensor
    answers: Tensor

    def to(self, device: torch.device) -> Questions:
        """The same on a device."""
        return Questions(self.ids.to(device), self.answers.to(device))

    def rows(self, chosen: Tensor) -> Questions:
        """Those of these numbers (Q,)."""
        return Questions(self.ids[chosen], self.answers[chosen])

    def losses(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Of logits (Q, N, vocabulary): nats of each answer (Q,), and whether its first token is the likeliest (Q,)."""
        ids, answers, before = self.ids[:, 1:], self.answers[:, 1:], logits[:, :-1].flatten(0, 1)
        nats = cross_entropy(before.float(), ids.flatten(), reduction="none").view_as(answers)
        first = answers & (answers.cumsum(-1) == 1)
        right = ((before.argmax(-1).view_as(ids) == ids) & first).any(-1)
        return (nats * answers).sum(-1), right


def questions(
    facts: Sequence[Fact], encode: Encode, width: int | None = None, before: Sequence[str] = ("",)
) -> Questions:
    """The facts as questions, in rows of so many tokens, of which a longer one fills the last; default: the longest.

    before: what stands before questions, in turn.
    """
    parts = [(encode(lead + fact.question), encode(fact.answer)) for lead, fact in zip(cycle(before), facts)]
    width = max(len(question) + len(answer) for question, answer in parts) if width is None else width
    ids, answers = (
        torch.zeros(len(parts), width, dtype=torch.int64),
        torch.zeros(len(parts), width, dtype=torch.bool),
    )
    for row, (question, answer) in enumerate(parts):
        asked = (question + answer)[-width:]
        ids[row, : len(asked)] = torch.tensor(asked)
        answers[row, max(0, len(asked) - len(answer)) : len(asked)] = True
    return Questions(ids, answers)


def passages(ids: Tensor, distances: Sequence[int], width: int, draw: random.Random) -> Questions:
    """Passages of a document (tokens,) as questions whose answers are how they go on, in rows of `width` tokens.

    distances: how many tokens before the document's end each begins.
    """
    rows, answers = torch.zeros(2, len(distances), width, dtype=torch.int64)
    for row, distance in enumerate(distances):
        begin, most = len(ids) - distance, min(width, distance)
        end = draw.randint(min(most, width // 3 + GOES_ON), most)
        rows[row, :end] = ids[begin : begin + end]
        answers[row, max(1, end - GOES_ON) : end] = 1
    return Questions(rows, answers.bool())
