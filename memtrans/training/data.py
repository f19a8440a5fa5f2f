"""The documents of a run: those that it learns from, and those held out."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memtrans.data.documents import Document, DocumentOrder, RandomWindows, Shuffled, lengths_of, stretches
from memtrans.data.recall import RecallDocuments, RecallTask
from memtrans.data.records import Fields
from memtrans.data.sources import READING, Corpus, Texts, all_of, corpus_of, load_library
from memtrans.data.store import Store, is_store
from memtrans.data.texts import STANDARD_LIBRARY, Source
from memtrans.data.tokens import BYTES, Tokenizer, open_tokenizer, tokenizer_of
from memtrans.data.tokens import FILE as TOKENIZER_FILE
from memtrans.training.checkpoint import Checkpoint
from memtrans.training.settings import Settings

RECALL = "recall"
ALL = "all"
TOKENIZER_PART = "tokenizer"  # of a checkpoint
MOST_HELD_OUT = 2**16  # documents of recall, which are written when they are opened


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from.

    Attributes:
        order: of documents to learn from. held_out: documents held out. fingerprint: of the corpus.
        reading: how the corpus is held out and shared out to rows, see `sources.READING`. tokenizer: of all documents.
        contents: of the corpus, see `documents.contents_of`.
    """

    order: DocumentOrder
    held_out: Sequence[Document]
    fingerprint: str
    reading: int = READING
    tokenizer: Tokenizer = BYTES
    contents: str = ""


def reading_of(values: Mapping[str, Any]) -> int:
    """How the run read its data that wrote a checkpoint with these values. Raises ValueError for a way unknown here."""
    reading = values.get("reading", 1)
    if type(reading) is not int or not 1 <= reading <= READING:
        raise ValueError(f"reading must be in [1, {READING}], as this version can read data, got {reading!r}")
    return reading


def tokenizer_in(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer that a checkpoint carries; bytes where it carries none.

    Raises ValueError where it is not the one that its values name, or `tokenizers` is missing.
    """
    carried = checkpoint.parts.get(TOKENIZER_PART, {}).get("json", torch.zeros(0, dtype=torch.uint8))
    if carried.dtype != torch.uint8:
        raise ValueError(f"checkpoint must carry its tokenizer as uint8, got {carried.dtype}")
    content = carried.numpy().tobytes()
    digest = hashlib.sha256(content).hexdigest() if content else BYTES.digest
    named = checkpoint.values.get("tokenizer", BYTES.digest)
    if digest != named:
        raise ValueError(f"checkpoint must carry the tokenizer that it names, {named}, got {digest}")
    return tokenizer_of(content, f"{TOKENIZER_FILE} of the checkpoint")


def tokenizer_part(tokenizer: Tokenizer) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint carries of a tokenizer, by part: nothing of bytes."""
    if tokenizer is BYTES:
        return {}
    return {TOKENIZER_PART: {"json": torch.frombuffer(bytearray(tokenizer.content), dtype=torch.uint8)}}


def open_data(
    settings: Settings,
    split: str = "validation",
    reading: int = READING,
    tokenizer: Tokenizer | None = None,
    trained: Mapping[str, Any] | None = None,
) -> TrainingData:
    """The documents that the settings ask for.

    Where there are fewer than rows they are cut into as many stretches: rows that read the same would learn the same.

    split: which documents are held out, `validation` or `test`. reading: as the run did that is to go on. tokenizer: of
        a checkpoint; default: what the settings name. trained: the values of a checkpoint that is to go on; text of one
        piece may have another name then.

    Raises FileNotFoundError or ValueError when there is no such data, tokenizer or split.
    """
    if settings.data == RECALL:
        return _recall_data(settings, reading, tokenizer)
    if trained is None:
        _check_join(settings)
    library = _library(settings, reading, tokenizer)
    fingerprint = library.fingerprint if trained is None else _known_as(library, settings.data, trained)
    corpus = corpus_of(library, settings.data)
    if not corpus.train:
        raise ValueError(
            "data must hold text of at least 2 tokens to learn from, got none beside "
            f"{len(corpus.validation) + len(corpus.test)} held-out texts in {settings.data!r}"
        )
    held_out = _held_out(corpus, split, settings.segment)
    if settings.windows:
        length = settings.window_segments * settings.segment + 1
        order: DocumentOrder = RandomWindows(corpus.train, length, settings.seed)
    else:
        documents = corpus.train if reading == 1 else _for_rows(corpus.train, settings.batch)
        order = Shuffled(documents, settings.seed)
    return TrainingData(order, held_out, fingerprint, reading, corpus.tokenizer, library.contents)


def check_apart(data: str, out: str | Path) -> None:
    """Raises ValueError where a run would write its files among the texts that it reads."""
    if data in (RECALL, STANDARD_LIBRARY):
        return
    path = Source(data).path
    if path.is_dir() and not is_store(path) and path.resolve() == Path(out).resolve():
        raise ValueError(f"out must be another directory than data, got {str(out)!r} for both")


def _library(settings: Settings, reading: int, tokenizer: Tokenizer | None) -> Texts:
    if tokenizer is None and settings.tokenizer is not None:
        tokenizer = open_tokenizer(settings.tokenizer)
    fields = Fields(settings.text_field, settings.join_by)
    library = load_library(settings.data, reading, fields, tokenizer)
    if library.tokenizer.vocabulary > settings.vocabulary:
        raise ValueError(
            f"vocabulary must be at least {library.tokenizer.vocabulary}, as many as the tokenizer has, "
            f"got {settings.vocabulary}"
        )
    return library


def _check_join(settings: Settings) -> None:
    """Raises ValueError where records are to be joined that a store holds as they were when it was made."""
    joins = settings.join_by is not None and settings.data != STANDARD_LIBRARY
    if joins and is_store(Source(settings.data).path):
        raise ValueError(
            f"join_by must be given to tokenize, not with the store {settings.data!r} that it made, got "
            f"{settings.join_by!r}"
        )


def _known_as(library: Texts, data: str, trained: Mapping[str, Any]) -> str:
    """The fingerprint of a corpus: the run's, whose checkpoint has these values, where it learned from the same text.

    Raises ValueError where it learned from the same texts under other names, which say what is held out of several.
    """
    own = str(trained["fingerprint"])
    if library.fingerprint == own or library.contents != trained.get("contents"):
        return library.fingerprint
    if (library.digests != library.digests[0]).any():
        raise ValueError(
            f"data must have the names with which the run read them, which say what is held out, got {data!r} with the "
            "same texts under others"
        )
    return own


def fitted(settings: Settings) -> Settings:
    """The settings with a vocabulary that the tokenizer fits in: of `settings.tokenizer`, or of a store.

    Raises FileNotFoundError or ValueError when there is no such tokenizer, or the store is damaged.

    >>> fitted(Settings()).vocabulary
    256
    """
    if settings.tokenizer is not None:
        tokenizer = open_tokenizer(settings.tokenizer)
    elif settings.data not in (RECALL, STANDARD_LIBRARY) and is_store(Source(settings.data).path):
        tokenizer = Store(Source(settings.data).path).tokenizer
    else:
        return settings
    return replace(settings, vocabulary=max(settings.vocabulary, tokenizer.vocabulary))


@dataclass(frozen=True)
class HeldOut:
    """What a run's model is evaluated on.

    Attributes:
        documents: of them. split: `validation`, `test`, or `all` of a corpus that the run did not learn from.
        fingerprint: of the corpus.
    """

    documents: Sequence[Document]
    split: str
    fingerprint: str


def open_held_out(settings: Settings, split: str | None, checkpoint: Checkpoint) -> HeldOut:
    """The documents of the settings' data that a run did not learn from.

    split: which held-out documents, `validation` or `test`; None for `validation` of what the run learned from, and for
        all of another corpus. checkpoint: the run's.

    Raises as `open_data` does.
    """
    reading, tokenizer = reading_of(checkpoint.values), tokenizer_in(checkpoint)
    if settings.data == RECALL:
        data = _recall_data(settings, reading, tokenizer)
        return HeldOut(data.held_out, split or "validation", data.fingerprint)
    library = _library(settings, reading, tokenizer)
    fingerprint = _known_as(library, settings.data, checkpoint.values)
    if split is None and fingerprint != checkpoint.values["fingerprint"]:
        return _foreign(library if reading == READING else _library(settings, READING, tokenizer), settings.data)
    split = split or "validation"
    return HeldOut(_held_out(corpus_of(library, settings.data), split, settings.segment), split, fingerprint)


def _foreign(library: Texts, data: str) -> HeldOut:
    """All of a corpus that a run did not learn from."""
    documents = all_of(library)
    if not documents:
        raise ValueError(f"data must hold text of at least 2 tokens, got none in {data!r}")
    return HeldOut(documents, ALL, library.fingerprint)


def _held_out(corpus: Corpus, split: str, segment: int) -> Sequence[Document]:
    """The documents of a split; warns where they have less than a segment of so many tokens."""
    held_out = {"validation": corpus.validation, "test": corpus.test}[split]
    if split == "validation" and not held_out:
        raise ValueError(f"data must hold out text of at least 2 tokens, got none in {corpus.name!r}")
    if not held_out:
        raise ValueError(f"split must be validation, which is all that {corpus.name!r} holds out, got {split!r}")
    if sum(lengths_of(held_out)) < segment:
        size = sum(document.size(0, len(document)) for document in held_out)
        warnings.warn(
            f"data {corpus.name!r} holds out {size} bytes, less than a segment of {segment} tokens: what they say of a "
            "model is next to nothing",
            stacklevel=3,
        )
    return held_out


def _for_rows(documents: Sequence[Document], rows: int) -> Sequence[Document]:
    """The documents, or stretches of them where fewer than `rows` differ; warns where even those are fewer."""
    distinct: dict[bytes, Document] = {}
    for document in documents:
        distinct.setdefault(document.digest(), document)
        if len(distinct) == rows:
            return documents
    cut = stretches(list(distinct.values()), rows)
    if len(cut) < rows:
        warnings.warn(
            f"batch is {rows}, but data has text for {len(cut)} rows that differ: the others read the same again",
            stacklevel=3,
        )
    return cut


def _recall_data(settings: Settings, reading: int, tokenizer: Tokenizer | None) -> TrainingData:
    """Facts and questions; the first documents of every row are near ones until `near_steps` are over."""
    if tokenizer not in (None, BYTES) or settings.tokenizer not in (None, BYTES.digest):
        raise ValueError(f"tokenizer must be bytes for recall, which is made of bytes, got {settings.tokenizer!r}")
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
    documents = [held_out.document(index) for index in range(count)]
    return TrainingData(RecallDocuments(settings.seed, task), documents, f"{RECALL} {task}", reading)
