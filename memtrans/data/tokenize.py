"""Texts become a store of tokens, a piece at a time; what was interrupted goes on where it was.

Every so often the files are forced to disk, and then `progress.json` says how much of them counts. The same call later
cuts the files back to that, reads past the texts that are done, which it compares with their hashes, and goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from memtrans.annotations import allows
from memtrans.data.held_out import LEAST
from memtrans.data.records import Text
from memtrans.data.store import (
    DOCUMENTS,
    INDEX,
    KIND,
    MOST_TOKENS,
    NAMES,
    PROGRESS,
    ROW,
    TOKENIZER,
    TOKENS,
    VERSION,
    Store,
    is_store,
    token_dtype,
    write_index,
)
from memtrans.data.texts import STANDARD_LIBRARY, Source
from memtrans.data.tokens import BYTES, Tokenizer, chunks_of
from memtrans.files import MOST_JSON, parse_json, read_file
from memtrans.locks import LOCK, Lock
from memtrans.storage import write_atomically

SAVED_EVERY = 64 << 20  # bytes of text
CHUNKS_AT_ONCE, BYTES_AT_ONCE = 1024, 4 << 20  # of one text or many, which a tokenizer spreads over the cores


@dataclass(frozen=True)
class Progress:
    """How much is done.

    Attributes:
        documents, names, tokens, size: documents that are whole, bytes of their names, their tokens, their bytes.
        chunks, open_tokens, open_digest: of the document after them: chunks that are done, their tokens, the SHA-256 of
            their bytes.
    """

    documents: int = 0
    names: int = 0
    tokens: int = 0
    size: int = 0
    chunks: int = 0
    open_tokens: int = 0
    open_digest: str = ""


def write_store(
    source: Source,
    out: str | Path,
    tokenizer: Tokenizer,
    way: str,
    cuts: tuple[int, ...] = (),
    report: Callable[[int], None] = lambda size: None,
    learned: int | None = None,
) -> Store:
    """Writes the tokens of a source's texts, or goes on with what an earlier call has left.

    Args:
        source: of the texts. out: a directory, made if missing. tokenizer: makes the tokens.
        way: how documents are held out, which the store keeps. cuts: places of bytes where tokens end in any case.
        report: called with the number of bytes done, every so often. learned: tokens that were asked of a tokenizer
            learned from the texts, None of another; a call that goes on has to ask for as many.

    Returns:
        The store, which is whole.

    Raises:
        ValueError: there is a store already, one of another source or tokenizer is unfinished there, another process
        writes it, the texts changed meanwhile, one of them has 2^31 tokens or more, or none has two bytes; where
        nothing was done yet, nothing is left. OSError: the disk is full; what is done is kept.
    """
    out = Path(out)
    check_new(out)
    check_texts(source)
    with ExitStack() as stack:
        stack.callback(lock_store(out).release)
        check_new(out)  # again: another process may have ended in it meanwhile
        return _written(source, out, tokenizer, way, cuts, report, learned)


def _written(
    source: Source,
    out: Path,
    tokenizer: Tokenizer,
    way: str,
    cuts: tuple[int, ...],
    report: Callable[[int], None],
    learned: int | None,
) -> Store:
    what = _what(source, tokenizer, way, cuts, learned)
    done = _read_progress(out, what)
    if done == Progress():
        _write_progress(out, what, done)
    if tokenizer.content:
        write_atomically(out / TOKENIZER, tokenizer.content)
    try:
        with ExitStack() as stack:
            writer = _Writer(out, what, tokenizer, done, cuts, report, stack)
            for text in source.texts():
                writer.take(text)
            writer.end()
        if not writer.done.documents:
            raise ValueError(f"data must hold text of at least 2 bytes, got none in {source.data!r}")
    except ValueError:
        if _read_progress(out, what) == Progress():
            _remove(out)  # there is nothing to go on from, and the next command may be another one
        raise
    index = {"tokenizer": tokenizer.digest, "vocabulary": tokenizer.vocabulary, "way": way}
    counts = {"documents": writer.done.documents, "tokens": writer.done.tokens, "bytes": writer.done.size}
    write_atomically(out / INDEX, write_index(out, {**index, **counts, "fingerprint": writer.fingerprint.hexdigest()}))
    (out / PROGRESS).unlink()
    return Store(out)


def lock_store(out: Path) -> Lock:
    """Makes the directory of a store this process's own. Raises ValueError where another one writes it."""
    return Lock(out, "command", "makes tokens")


def check_texts(source: Source) -> None:
    """Raises FileNotFoundError where there is nothing, ValueError where there is a store, whose files are no texts."""
    source.check()
    if source.data != STANDARD_LIBRARY and is_store(source.path):
        raise ValueError(f"data must be texts, got {source.data!r}, a store of tokens")


def check_new(out: Path) -> None:
    """Raises ValueError where there is anything but a store that is unfinished."""
    if (out / INDEX).is_file() and is_store(out):
        raise ValueError(f"out must hold no store, got {str(out)!r}, which does")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a directory or not exist, got {str(out)!r}, a file")
    if out.exists() and not is_store(out):
        ours = (f".{TOKENIZER}.", f".{PROGRESS}.")  # what a kill may leave, beside the lock
        names = (path.name for path in out.iterdir())
        taken = next((name for name in names if name != LOCK and not name.startswith(ours)), None)
        if taken is not None:
            raise ValueError(f"out must be an empty directory or not exist, got {str(out)!r}, which holds {taken!r}")


class _End(NamedTuple):
    """Where a text ends: the number of chunks in the queue up to there; and its name, bytes and SHA-256."""

    chunk: int
    name: str
    size: int
    digest: bytes


class _Writer:
    """The files of a store that is being written."""

    def __init__(
        self,
        out: Path,
        what: str,
        tokenizer: Tokenizer,
        done: Progress,
        cuts: tuple[int, ...],
        report: Callable[[int], None],
        stack: ExitStack,
    ) -> None:
        self.out, self.what, self.tokenizer, self.cuts, self.report = out, what, tokenizer, cuts, report
        self.done, self._dtype = done, token_dtype(tokenizer)
        tokens = (done.tokens + done.open_tokens) * self._dtype.itemsize
        self._tokens = stack.enter_context(_cut_back(out / TOKENS, tokens))
        self._rows = stack.enter_context(_cut_back(out / DOCUMENTS, done.documents * ROW.itemsize))
        self._names = stack.enter_context(_cut_back(out / NAMES, done.names))
        self._done_before = done.documents
        self._behind = np.fromfile(out / DOCUMENTS, dtype=ROW, count=done.documents)["digest"]
        self._seen = 0  # documents, done earlier or taken
        self._skipped = done.chunks  # of the first text that is not done
        self._queue: list[bytes] = []  # chunks whose tokens are still to be made, of one text or many
        self._queued = 0  # their bytes
        self._ends: list[_End] = []  # of the texts that end among them
        self._name = ""  # of the text that is taken
        self._unsaved = 0  # bytes
        self._size, self._digest = 0, hashlib.sha256()  # of the text that is taken, as far as it is
        self.fingerprint = hashlib.sha256()

    def take(self, text: Text) -> None:
        """Takes a text, or reads past one that is done."""
        self._name, self._size, self._digest = text.name, 0, hashlib.sha256()
        is_done = self._seen < self._done_before
        if is_done:
            for piece in text.pieces:
                self._note(piece)
        else:
            self._enqueue(text)
        digest = self._digest.digest()
        if self._size < LEAST:
            return
        if not is_done:
            self._ends.append(_End(len(self._queue), text.name, self._size, digest))
        elif digest != self._behind[self._seen].tobytes():
            raise self._changed(text.name)
        self._seen += 1
        self.fingerprint.update(f"{text.name}\0{self._size}\0".encode(errors="surrogateescape"))
        self.fingerprint.update(digest)

    def end(self) -> None:
        """Writes what is left. Raises ValueError where fewer texts came than were begun earlier."""
        self._flush()
        if self._seen < self._done_before or self._skipped:
            raise self._changed("its end")
        self.save()

    def _note(self, piece: bytes) -> None:
        self._digest.update(piece)
        self._size += len(piece)

    def _changed(self, name: str) -> ValueError:
        return ValueError(
            f"data must be what it was when tokenizing began, got {name!r} changed since: "
            f"remove {str(self.out)!r} to begin again"
        )

    def _enqueue(self, text: Text) -> None:
        """Takes the chunks of a text behind those of it that are written; none of one that is too short to count."""
        pieces: Iterator[bytes] = filter(None, text.pieces)
        beginning = list(islice(pieces, LEAST))
        if sum(map(len, beginning)) < LEAST:
            return
        pieces = chain(beginning, pieces)
        chunks = pieces if self.tokenizer is BYTES else chunks_of(pieces, self.cuts)
        if self._skipped:
            for chunk in islice(chunks, self._skipped):
                self._note(chunk)
            if self._digest.hexdigest() != self.done.open_digest:
                raise self._changed(text.name)
            self._skipped = 0
        for chunk in chunks:
            if len(self._queue) >= CHUNKS_AT_ONCE or self._queued >= BYTES_AT_ONCE:
                self._flush()
            self._note(chunk)
            self._queue.append(chunk)
            self._queued += len(chunk)

    def _flush(self) -> None:
        """Writes the tokens of what is queued, and the rows of the texts that end in it."""
        encoded, counts = self._tokens_of(self._queue)
        self._tokens.write(encoded)
        start = 0
        for end in self._ends:
            self._add(sum(counts[start : end.chunk]), end.chunk - start, end.name)
            self._close(end)
            start = end.chunk
        self._add(sum(counts[start:]), len(counts) - start, self._name)
        self._unsaved += self._queued
        self._queue, self._ends, self._queued = [], [], 0
        if self._unsaved >= SAVED_EVERY:
            self.save()

    def _tokens_of(self, chunks: list[bytes]) -> tuple[bytes, list[int]]:
        """The tokens of chunks, as they stand in the file, and how many each has."""
        if self.tokenizer is BYTES:
            return b"".join(chunks), [len(chunk) for chunk in chunks]
        found = self.tokenizer.encode_chunks(chunks)
        encoded = b"".join(tokens.astype(self._dtype, copy=False).tobytes() for tokens in found)
        return encoded, [len(tokens) for tokens in found]

    def _add(self, tokens: int, chunks: int, name: str) -> None:
        """Counts tokens that are written of a text."""
        count = self.done.open_tokens + tokens
        if count >= MOST_TOKENS:
            raise ValueError(
                f"data must hold documents of fewer than {MOST_TOKENS} tokens, got more in {name!r}: cut it into "
                "several files or records"
            )
        self.done = replace(self.done, chunks=self.done.chunks + chunks, open_tokens=count)

    def _close(self, end: _End) -> None:
        """Adds the row and the name of a text whose tokens are written."""
        done, name = self.done, end.name.encode(errors="surrogateescape")
        self.done = Progress(
            done.documents + 1, done.names + len(name), done.tokens + done.open_tokens, done.size + end.size
        )
        row = np.zeros(1, dtype=ROW)
        row[0] = (self.done.names, self.done.tokens, self.done.size, np.frombuffer(end.digest, dtype=np.uint8))
        self._names.write(name)
        self._rows.write(row.tobytes())

    def save(self) -> None:
        """Forces what is written to disk, and says how far it has come."""
        for file in (self._tokens, self._rows, self._names):
            file.flush()
            os.fsync(file.fileno())
        if self.done.chunks:
            self.done = replace(self.done, open_digest=self._digest.hexdigest())
        _write_progress(self.out, self.what, self.done)
        self._unsaved = 0
        self.report(self.done.size + (self._size if self.done.chunks else 0))


def _what(source: Source, tokenizer: Tokenizer, way: str, cuts: tuple[int, ...], learned: int | None) -> str:
    """Tells what is tokenized, by what, from everything else."""
    where = str(source.path.resolve()) if source.data != STANDARD_LIBRARY else source.data
    return hashlib.sha256(repr((where, source.fields, tokenizer.digest, way, cuts, learned)).encode()).hexdigest()


def _read_progress(out: Path, what: str) -> Progress:
    """How far an earlier call has come. Raises ValueError where it wrote something else."""
    if not (out / PROGRESS).is_file():
        return Progress()
    values = parse_json(read_file(PROGRESS, out / PROGRESS, MOST_JSON))
    kinds = {name: type(value) for name, value in asdict(Progress()).items()}
    whole = isinstance(values, dict) and all(allows(kind, values.get(name)) for name, kind in kinds.items())
    if not whole or values.get("kind") != KIND or values.get("version") != VERSION:
        raise ValueError(f"out must hold the progress of this version, got {str(out / PROGRESS)!r} of another")
    if values.get("what") != what:
        raise ValueError(
            f"out must be unfinished by the same data and tokenizer, got {str(out)!r}, begun with others: remove it to "
            "begin again"
        )
    return Progress(**{name: values[name] for name in kinds})


def _write_progress(out: Path, what: str, done: Progress) -> None:
    progress = {"kind": KIND, "version": VERSION, "what": what, **asdict(done)}
    write_atomically(out / PROGRESS, (json.dumps(progress) + "\n").encode())


def _cut_back(path: Path, size: int) -> IO[bytes]:
    """A file open for writing behind its first `size` bytes. Raises ValueError where it is shorter."""
    file = path.open("ab")
    if file.tell() < size:
        found = file.tell()
        file.close()
        raise ValueError(f"store must hold what {PROGRESS} says, got {found} of {size} bytes in {str(path)!r}")
    file.truncate(size)
    file.seek(size)
    return file


def _remove(out: Path) -> None:
    """Removes the files of a store of which nothing is done."""
    for name in (TOKENS, DOCUMENTS, NAMES, TOKENIZER, PROGRESS, LOCK):  # what tells a store that has not ended is last
        (out / name).unlink(missing_ok=True)


def describe(store: Store) -> dict[str, Any]:
    """What a store holds, as `tokenize` prints it."""
    size, tokens = int(store.sizes.sum()), int(store.lengths.sum())
    return {
        "documents": len(store),
        "tokens": tokens,
        "bytes": size,
        "bytes_per_token": round(size / tokens, 3) if tokens else None,
        "vocabulary": store.tokenizer.vocabulary,
        "out": str(store.path),
    }
