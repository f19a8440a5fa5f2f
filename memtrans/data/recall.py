"""A task that only a memory can do: facts stated once and asked for thousands of bytes later.

A document is a row of statements `ab=x;` and questions `ab?x;`. Names are drawn without repetition, values at
random, and each fact is asked for once, so nothing but the one statement tells the answer. Only the answers are
scored: the byte after each `?`. How many bytes ago the fact was stated is kept with every question.

What starts the one softmax of local and retrieved keys, found by trying (the preset `recall` sets all of it):
- The first documents are short and ask within `near` bytes, where local attention reaches only a handful of facts.
  What a layer learns there about finding a name is what its memory needs, because both share queries and keys. In a
  prototype, questions 5 to 100 bytes away started after 400 to 800 steps, if at all; 5 to 30 within 200.
- The retrieved logits start with an offset of -2: random neighbours drown the local keys meanwhile. At step 200 the
  loss was 3.5 bits with an offset of 0, 2.5 with -2 and 0.7 with -4; but at step 800, with far questions, 0.26 with -2
  and 0.45 with -4.
- Local heads start at looking 1, 2, 3 and 4 bytes back, where the letters of a name are. With T5's random start a
  prototype answered 11 % of near questions after 900 steps; with this one 59 %, all that it could see, after 400.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass

import torch

from memtrans.data.documents import Document

LETTERS = "abcdefghijklmnopqrstuvwxyz"
NAME_LENGTH = 2
FAR = 2000  # bytes between a fact and its question that count as far
CHANCE = 1 / len(LETTERS)


@dataclass(frozen=True)
class RecallTask:
    """How far away facts are asked for, in bytes.

    Attributes:
        length: longest document; they are between three quarters of it and all of it.
        near_share, far_share: of the questions; the rest lies between.
        near, far: ranges of the distances.
        near_documents: so many documents ask near questions only, and are `near_length` long.
    """

    length: int = 4500
    near_share: float = 0.3
    far_share: float = 0.45
    near: tuple[int, int] = (5, 30)
    far: tuple[int, int] = (FAR, 3000)
    near_documents: int = 0
    near_length: int = 1024


class RecallDocuments:
    """Documents of the task without end; `seed` and the number determine each.

    >>> document = RecallDocuments(seed=0, task=RecallTask()).document(3)
    >>> text = bytes(document.content.tolist()).decode()
    >>> text[2], text[4], int((document.distances > 0).sum()) == text.count("?")
    ('=', ';', True)
    """

    def __init__(self, seed: int | str, task: RecallTask) -> None:
        self.seed, self.task = seed, task

    @property
    def count(self) -> int | None:
        return None

    def document(self, index: int) -> Document:
        task = self.task
        generator = random.Random(f"recall {self.seed} {index}")
        easy = index < task.near_documents
        longest = task.near_length if easy else task.length
        text, distances = _write(generator, generator.randint(longest * 3 // 4, longest), task, easy)
        return Document(f"recall {index}", Document.of("", text).content, distances)


def _write(generator: random.Random, length: int, task: RecallTask, easy: bool) -> tuple[bytes, torch.Tensor]:
    """The text of a document and the distances of its questions."""
    names = iter(generator.sample([a + b for a in LETTERS for b in LETTERS], len(LETTERS) ** NAME_LENGTH))
    pending: list[tuple[int, int, str, str]] = []  # due, stated, name, value
    text, asked = "", []
    while len(text) < length:
        if pending and pending[0][0] <= len(text):
            _, stated, name, value = heapq.heappop(pending)
            asked.append((len(text) + NAME_LENGTH, len(text) - stated))
            text += f"{name}?{value};"
        else:
            name, value = next(names), generator.choice(LETTERS)
            heapq.heappush(pending, (len(text) + _distance(generator, task, easy), len(text), name, value))
            text += f"{name}={value};"
    distances = torch.zeros(len(text), dtype=torch.int64)
    for place, distance in asked:
        distances[place] = distance
    return text.encode(), distances


def _distance(generator: random.Random, task: RecallTask, easy: bool) -> int:
    kind = generator.random()
    if easy or kind < task.near_share:
        return generator.randrange(*task.near)
    if kind < 1 - task.far_share:
        return generator.randrange(task.near[1], task.far[0])
    return generator.randrange(*task.far)
