"""Corpora: where documents come from, and which of them are held out.

Few bytes are read into memory. What is long, and whatever a tokenizer has to read for more than a moment, becomes a
store of tokens (see `store.py`): where `memtrans tokenize` says, or in a directory that later runs find again.
"""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from memtrans.data.documents import Chosen, Document, Library, contents_of
from memtrans.data.held_out import ENWIK8, LEAST, NAMED, before_end, cuts_of, drawn, enwik8_ends, named, way_of
from memtrans.data.records import Fields
from memtrans.data.store import INDEX, VERSION, Store, is_store
from memtrans.data.texts import RECORD_FIELDS, STANDARD_LIBRARY, Source, standard_library_files
from memtrans.data.tokenize import write_store
from memtrans.data.tokens import BYTES, Tokenizer, chunks_of
from memtrans.files import expanded
from memtrans.locks import alone

READING = 2  # how documents are held out and shared out to rows; a checkpoint keeps the number of its run
MOST_READ = 256 << 20  # bytes that are read into memory
MOST_ENCODED = 8 << 20  # bytes of which a run's tokens are made each time it starts
CACHE = "MEMTRANS_CACHE"  # names the directory of stores that runs made


@dataclass(frozen=True)
class Corpus:
    """Documents to learn from and documents held out.

    Attributes:
        name: what was asked for. train, validation, test: the documents; test is empty but for enwik8, and for a
            dataset that has one.
        documents: all of them, whole. fingerprint: of every name and byte; two corpora with the same one are the same.
        tokenizer: of all documents.
    """

    name: str
    train: Sequence[Document]
    validation: Sequence[Document]
    test: Sequence[Document]
    documents: Sequence[Document]
    fingerprint: str
    tokenizer: Tokenizer = BYTES


def load_corpus(
    data: str, reading: int = READING, fields: Fields | None = None, tokenizer: Tokenizer | None = None
) -> Corpus:
    """Reads all documents of a source and holds some out, see `load_library` and `corpus_of`."""
    return corpus_of(load_library(data, reading, fields, tokenizer), data)


def corpus_of(library: Texts, data: str) -> Corpus:
    """What `load_library` read, with some documents held out, always the same ones.

    Documents of the same text are held out together, or not at all. A dataset may say itself that all are.

    data: what was read.

    Raises ValueError where there is too little text to hold some out, or an enwik8 has the wrong length.
    """
    return Corpus(data, *_split(library, data), all_of(library), library.fingerprint, library.tokenizer)


def all_of(library: Texts) -> Chosen:
    """The documents of a library with at least two tokens."""
    return Chosen(library, np.arange(len(library.sizes)))


def load_library(
    data: str, reading: int = READING, fields: Fields | None = None, tokenizer: Tokenizer | None = None
) -> Texts:
    """Reads all documents of a source.

    Args:
        data: `stdlib`; or a file (.gz, .xz and .zst are unpacked; of a .zip each member is read like a file, of .jsonl
            and .parquet each record is a document); or a directory: each of its files is read like that, and each
            directory in it is a document, all text files below it in path order; or a dataset that Hugging Face's
            library saved; or a store of tokens. A file called enwik8 (or enwik8.zip, ...) gets the standard split of
            90, 5 and 5 million.
        reading: 1 reads as runs did whose checkpoints name no way: it holds documents out by their names alone.
        fields: of records. Default: the field `text`, each record by itself.
        tokenizer: makes the tokens. Default: that of a store, or bytes.

    Raises:
        FileNotFoundError: no such path. ValueError: no bytes in it, a damaged archive or store, a store of another
        tokenizer, or records without the field. OSError: the disk is full, where a store is made.
    """
    source = Source(data, fields or RECORD_FIELDS, records=reading > 1)
    source.check()
    if data != STANDARD_LIBRARY and is_store(source.path):
        store = Store(source.path)
        if tokenizer is not None and tokenizer.digest != store.tokenizer.digest:
            raise ValueError(
                f"data must hold tokens of {_shown(tokenizer)}, got {data!r} with those of {_shown(store.tokenizer)}"
            )
        return store
    if reading == 1 or source.is_pipe() or source.size() <= _most_read(tokenizer or BYTES):
        return _Read(source, tokenizer or BYTES, reading)
    return _cached_store(source, tokenizer or BYTES)


def standard_library() -> list[Document]:
    """The sources of the running Python's own library: a package is a document, and so is a top-level module.

    >>> "json" in [document.name for document in standard_library()]
    True
    """
    files = standard_library_files()
    return [Document.of(name, b"".join(file.read_bytes() for file in of_name)) for name, of_name in files]


def _most_read(tokenizer: Tokenizer) -> int:
    return MOST_READ if tokenizer is BYTES else MOST_ENCODED


def _shown(tokenizer: Tokenizer) -> str:
    return "bytes" if tokenizer is BYTES else f"a vocabulary of {tokenizer.vocabulary} (sha256 {tokenizer.digest[:8]})"


class _Read:
    """The documents of a source in memory; see `documents.Library`."""

    def __init__(self, source: Source, tokenizer: Tokenizer, reading: int) -> None:
        self.tokenizer, self.way = tokenizer, way_of(source)
        self._documents: list[Document] = []
        digests, sizes, fingerprint = [], [], hashlib.sha256()
        for name, pieces in source.texts():
            content = b"".join(pieces)
            if len(content) < LEAST:
                continue
            self._documents.append(_encoded(name, content, tokenizer, cuts_of(self.way)))
            sizes.append(len(content))
            digests.append(hashlib.sha256(content).digest())
            fingerprint.update(f"{name}\0{len(content)}\0".encode(errors="surrogateescape"))
            fingerprint.update(digests[-1] if reading > 1 else content)
        if not sizes:
            raise ValueError(f"data must hold text of at least 2 bytes, got none in {source.data!r}")
        self.contents = contents_of(_rows(digests))
        if reading == 1:  # which looked at no text
            digests = [hashlib.sha256(str(number).encode()).digest() for number in range(len(sizes))]
        self.fingerprint = fingerprint.hexdigest()
        self.digests = _rows(digests)
        self.sizes = np.array(sizes, dtype=np.int64)
        self.lengths = np.array([len(document) for document in self._documents], dtype=np.int64)

    def name(self, index: int) -> str:
        return self._documents[index].name

    def document(self, index: int) -> Document:
        return self._documents[index]


def _rows(digests: list[bytes]) -> NDArray[np.uint8]:
    """Digests as a library has them."""
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32)


def _encoded(name: str, content: bytes, tokenizer: Tokenizer, cuts: tuple[int, ...]) -> Document:
    if tokenizer is BYTES:
        return Document.of(name, content)
    tokens = np.concatenate(tokenizer.encode_chunks(list(chunks_of([content], cuts))))
    return Document(name, torch.from_numpy(tokens), tokenizer=tokenizer)


Texts: TypeAlias = Store | _Read


# ------------------------------------------------------------------------------------------------- stores of runs


def cache_directory() -> Path:
    """Where stores are that runs made: MEMTRANS_CACHE, or `memtrans` in the user's directory of caches.

    Raises ValueError where neither is known.
    """
    if os.environ.get(CACHE):
        return expanded(os.environ[CACHE])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "memtrans"
    try:
        return Path.home() / ".cache" / "memtrans"
    except RuntimeError as error:
        raise ValueError(f"{CACHE} must name a directory for stores where the user has none, got nothing") from error


def _cached_store(source: Source, tokenizer: Tokenizer) -> Store:
    """The store of a source that does not change; the first process that asks for it makes it, others wait."""
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in source.files()]
    key = hashlib.sha256(repr((files, source.data, source.fields, tokenizer.digest, VERSION)).encode()).hexdigest()
    directory = cache_directory() / key[:32]
    with _cache_named(directory.parent):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with alone(directory.with_suffix(".lock")):
            if (directory / INDEX).is_file():
                return _found(directory)
            print(f"making tokens of {source.data} in {directory}, once", file=sys.stderr, flush=True)
            way = way_of(source)
            return write_store(source, directory, tokenizer, way, cuts_of(way))


def _found(directory: Path) -> Store:
    """A store that an earlier run made. Raises ValueError where it is damaged."""
    try:
        return Store(directory)
    except ValueError as error:
        raise ValueError(f"{error}; remove that directory, and the next run makes it again") from error


@contextmanager
def _cache_named(cache: Path) -> Iterator[None]:
    """Says of an error of this directory, or of a file written there, how another one is named."""
    try:
        yield
    except OSError as error:
        path = None if error.filename is None else Path(str(error.filename))
        if path is not None and not path.is_relative_to(cache) and not cache.is_relative_to(path):
            raise
        expected = f"{CACHE} must name a directory where stores can be written"
        raise OSError(f"{expected}, got {str(cache)!r}: {error}") from error


# ----------------------------------------------------------------------------------------------- what is held out

Parts = tuple[Sequence[Document], Sequence[Document], Sequence[Document]]


def _split(library: Texts, data: str) -> Parts:
    """The documents to learn from, for validation and for tests."""
    if library.way == ENWIK8:
        return _enwik8(data, library)
    if library.way == NAMED:
        return _named(library)
    return *_drawn(library, np.arange(len(library.sizes))), []


def _enwik8(data: str, library: Library) -> tuple[list[Document], list[Document], list[Document]]:
    """The split of enwik8 that everybody reports, one document each."""
    sizes, ends = library.sizes.tolist(), enwik8_ends()
    if sizes != [ends[-1]]:
        raise ValueError(f"data must be one file of {ends[-1]} bytes to be enwik8, got {sizes} in {data!r}")
    only = library.document(0)
    places = [0, *(only.place(end) for end in ends)]
    names = ("train", "validation", "test")
    parts = [only.part(name, *places[number : number + 2]) for number, name in enumerate(names)]
    return [parts[0]], [parts[1]], [parts[2]]


def _named(library: Library) -> Parts:
    """The splits that names begin with; without one for validation some of the rest is held out."""
    names = [library.name(index) for index in range(len(library.sizes))]
    validation, test = named(names)
    rest, for_tests = np.flatnonzero(~validation & ~test), Chosen(library, np.flatnonzero(test))
    if validation.any() or not len(rest):
        return Chosen(library, rest), Chosen(library, np.flatnonzero(validation)), for_tests
    return *_drawn(library, rest), for_tests


def _drawn(library: Library, indices: NDArray[np.int64]) -> tuple[Sequence[Document], Sequence[Document]]:
    """Holds out whole documents, drawn by the hash of their names; of a single text its end."""
    held_out = drawn(library.name, library.sizes, library.digests, indices)
    if held_out is None:
        return _single(library, indices)
    return Chosen(library, indices[~held_out]), Chosen(library, indices[held_out])


def _single(library: Library, indices: NDArray[np.int64]) -> tuple[Sequence[Document], Sequence[Document]]:
    """Holds out the end of a document; of copies of it the first one is read."""
    only, size = library.document(int(indices[0])), int(library.sizes[indices[0]])
    if len(indices) > 1:
        warnings.warn(f"data holds one text {len(indices)} times, of which {only.name!r} is read", stacklevel=5)
    border = before_end(size)
    if border < 2:
        raise ValueError(f"data must hold at least 4 bytes, got {size} in {only.name!r}")
    place = only.place(border)
    if place < 2 or len(only) - place < 2:
        raise ValueError(
            f"data must hold at least 2 tokens to learn from and 2 held out, got {len(only)} in {only.name!r}"
        )
    return [only.part(only.name, 0, place)], [only.part(f"{only.name} (its end)", place, len(only))]
