"""The documents of a run: those that it learns from, and those held out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from memtrans.data.documents import Document, DocumentOrder, RandomWindows, Shuffled
from memtrans.data.recall import RecallDocuments, RecallTask
from memtrans.data.sources import load_corpus
from memtrans.training.settings import Settings

RECALL = "recall"
MOST_HELD_OUT = 2**16  # documents of recall, which are written when they are opened


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from: an order of documents, documents held out, and which corpus that is."""

    order: DocumentOrder
    held_out: Sequence[Document]
    fingerprint: str


def open_data(settings: Settings, split: str = "validation") -> TrainingData:
    """The documents that the settings ask for.

    split: which documents are held out, `validation` or `test`.

    Raises FileNotFoundError or ValueError when there is no such data or no such split.
    """
    if settings.data == RECALL:
        return _recall_data(settings)
    corpus = load_corpus(settings.data)
    held_out = {"validation": corpus.validation, "test": corpus.test}[split]
    if not held_out:
        raise ValueError(f"split must be validation, which is all that {settings.data!r} holds out, got {split!r}")
    order: DocumentOrder = Shuffled(corpus.train, settings.seed)
    if settings.windows:
        order = RandomWindows(corpus.train, settings.window_segments * settings.segment + 1, settings.seed)
    return TrainingData(order, held_out, corpus.fingerprint)


def _recall_data(settings: Settings) -> TrainingData:
    """Facts and questions; the first documents of every row are near ones until `near_steps` are over."""
    if settings.windows:
        raise ValueError("windows must be off for recall, whose far questions no window holds, got True")
    segments = settings.near_steps * settings.segments * settings.accumulate
    per_document = math.ceil(RecallTask.near_length * 7 / 8 / settings.segment)
    task = RecallTask(near_documents=settings.batch * segments // per_document)
    held_out_task = RecallTask()
    held_out = RecallDocuments("held out", held_out_task)
    least = held_out_task.length * 3 // 4
    if settings.eval_bytes > MOST_HELD_OUT * least:
        raise ValueError(f"eval_bytes must be at most {MOST_HELD_OUT * least} of recall, got {settings.eval_bytes}")
    count = max(settings.batch, math.ceil(settings.eval_bytes / least))
    return TrainingData(
        RecallDocuments(settings.seed, task), [held_out.document(index) for index in range(count)], f"{RECALL} {task}"
    )
