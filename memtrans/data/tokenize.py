"""Texts become a store of tokens, a piece at a time; what was interrupted goes on where it was.

Every so often the files are forced to disk, and then `progress.json` says how much of them counts. The same call later
cuts the files back to that, reads past the texts that are done, which it compares with their hashes, and goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from memtrans.annotations import allows
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
    token_dtype,
    write_index,
)
from memtrans.data.texts import Source
from memtrans.data.tokens import BYTES, Tokenizer, chunks_of
from memtrans.files import MOST_JSON, parse_json, read_file
from memtrans.storage import write_atomically

SAVED_EVERY = 64 << 20  # bytes of text
CHUNKS_AT_ONCE = 64  # that a tokenizer spreads over the cores
PIECES_AT_ONCE = 4  # that are written at once where tokens are bytes
LEAST = 2  # bytes of a text: a token and what comes after it


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
) -> Store:
    """Writes the tokens of a source's texts, or goes on with what an earlier call has left.

    Args:
        source: of the texts. out: a directory, made if missing. tokenizer: makes the tokens.
        way: how documents are held out, which the store keeps. cuts: places of bytes where tokens end in any case.
        report: called with the number of bytes done, every so often.

    Returns:
        The store, which is whole.

    Raises:
        ValueError: there is a store already, one of another source or tokenizer is unfinished there, the texts changed
        meanwhile, one of them has 2^31 tokens or more, or none has two bytes. OSError: the disk is full; what is done
        is kept.
    """
    out = Path(out)
    check_new(out)
    source.check()
    out.mkdir(parents=True, exist_ok=True)
    what = _what(source, tokenizer, way, cuts)
    done = _read_progress(out, what)
    if done == Progress():
        _write_progress(out, what, done)
    if tokenizer.content:
        write_atomically(out / TOKENIZER, tokenizer.content)
    with ExitStack() as stack:
        writer = _Writer(out, what, tokenizer, done, cuts, report, stack)
        for text in source.texts():
            writer.take(text)
        writer.end()
    if not writer.done.documents:
        _remove(out)
        raise ValueError(f"data must hold text of at least 2 bytes, got none in {source.data!r}")
    index = {"tokenizer": tokenizer.digest, "vocabulary": tokenizer.vocabulary, "way": way}
    counts = {"documents": writer.done.documents, "tokens": writer.done.tokens, "bytes": writer.done.size}
    write_atomically(out / INDEX, write_index(out, {**index, **counts, "fingerprint": writer.fingerprint.hexdigest()}))
    (out / PROGRESS).unlink()
    return Store(out)


def check_new(out: Path) -> None:
    """Raises ValueError where there is a store already, or what is no directory."""
    if (out / INDEX).is_file():
        raise ValueError(f"out must hold no store, got {str(out)!r}, which does")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a directory or not exist, got {str(out)!r}, a file")


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
        self._behind = np.fromfile(out / DOCUMENTS, dtype=ROW, count=done.documents)["digest"]
        self._seen = 0  # documents, done earlier or now
        self._at_once = PIECES_AT_ONCE if tokenizer is BYTES else CHUNKS_AT_ONCE
        self._unsaved = 0  # bytes
        self._open_size = 0  # bytes of the text that was taken last, until it is done
        self._digest = hashlib.sha256()  # of the same text
        self.fingerprint = hashlib.sha256()

    def take(self, text: Text) -> None:
        """Writes a text, or reads past one that is done."""
        self._open_size, self._digest = 0, hashlib.sha256()
        is_done = self._seen < self.done.documents
        if is_done:
            for _ in self._counted(text.pieces):
                pass
        else:
            self._encode(text)
        size, digest = self._open_size, self._digest.digest()
        self._open_size = 0
        if size < LEAST:
            if not is_done:
                self._forget()
            return
        if not is_done:
            self._end(text.name, size, digest)
        elif digest != self._behind[self._seen].tobytes():
            raise self._changed(text.name)
        self._seen += 1
        self.fingerprint.update(f"{text.name}\0{size}\0".encode(errors="surrogateescape"))
        self.fingerprint.update(digest)

    def end(self) -> None:
        """Writes what is left. Raises ValueError where fewer texts came than were done earlier."""
        if self._seen < self.done.documents or self.done.chunks:
            raise self._changed("its end")
        self.save()

    def _counted(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """The chunks of a text; `_digest` and `_open_size` are of those that were taken."""
        for chunk in chunks:
            self._digest.update(chunk)
            self._open_size += len(chunk)
            yield chunk

    def _changed(self, name: str) -> ValueError:
        return ValueError(
            f"data must be what it was when tokenizing began, got {name!r} changed since: "
            f"remove {str(self.out)!r} to begin again"
        )

    def _encode(self, text: Text) -> None:
        """Writes a text's tokens behind those of it that are written."""
        name = text.name
        chunks = self._counted(text.pieces if self.tokenizer is BYTES else chunks_of(text.pieces, self.cuts))
        for _ in islice(chunks, self.done.chunks):
            pass
        if self.done.chunks and self._digest.hexdigest() != self.done.open_digest:
            raise self._changed(name)
        while some := list(islice(chunks, self._at_once)):
            tokens = self._tokens_of(some)
            count = self.done.open_tokens + len(tokens) // self._dtype.itemsize
            if count >= MOST_TOKENS:
                raise ValueError(
                    f"data must hold documents of fewer than {MOST_TOKENS} tokens, got more in {name!r}: cut it into "
                    "several files or records"
                )
            self._tokens.write(tokens)
            self.done = replace(self.done, chunks=self.done.chunks + len(some), open_tokens=count)
            self._unsaved += sum(map(len, some))
            if self._unsaved >= SAVED_EVERY:
                self.save()

    def _tokens_of(self, chunks: list[bytes]) -> bytes:
        """The tokens of pieces of a text, as they stand in the file."""
        if self.tokenizer is BYTES:
            return b"".join(chunks)
        return np.concatenate(self.tokenizer.encode_chunks(chunks)).astype(self._dtype, copy=False).tobytes()

    def _forget(self) -> None:
        """Takes back a text that is too short."""
        self._tokens.flush()
        self._tokens.seek(self.done.tokens * self._dtype.itemsize)
        self._tokens.truncate()
        self.done = replace(self.done, chunks=0, open_tokens=0, open_digest="")

    def _end(self, name: str, size: int, digest: bytes) -> None:
        """Adds a document's row and name."""
        done, encoded = self.done, name.encode(errors="surrogateescape")
        self.done = Progress(
            done.documents + 1, done.names + len(encoded), done.tokens + done.open_tokens, done.size + size
        )
        row = np.zeros(1, dtype=ROW)
        row[0] = (self.done.names, self.done.tokens, self.done.size, np.frombuffer(digest, dtype=np.uint8))
        self._names.write(encoded)
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
        self.report(self.done.size + self._open_size)


def _what(source: Source, tokenizer: Tokenizer, way: str, cuts: tuple[int, ...]) -> str:
    """Tells what is tokenized, by what, from everything else."""
    where = str(source.path.resolve()) if source.files() else source.data
    return hashlib.sha256(repr((where, source.fields, tokenizer.digest, way, cuts)).encode()).hexdigest()


def _read_progress(out: Path, what: str) -> Progress:
    """How far an earlier call has come. Raises ValueError where it wrote something else."""
    if not (out / PROGRESS).is_file():
        ours = (TOKENIZER, f".{TOKENIZER}.", f".{PROGRESS}.")  # what a kill may leave
        taken = next((path for path in out.iterdir() if not path.name.startswith(ours)), None)
        if taken is not None:
            raise ValueError(
                f"out must be an empty directory or not exist, got {str(out)!r}, which holds {taken.name!r}"
            )
        return Progress()
    values = parse_json(read_file(PROGRESS, out / PROGRESS, MOST_JSON))
    kinds = {name: type(value) for name, value in asdict(Progress()).items()}
    whole = isinstance(values, dict) and all(allows(kind, values.get(name)) for name, kind in kinds.items())
    if not whole or values.get("kind") != KIND or values.get("version") != VERSION:
        raise ValueError(f"out must hold the progress of this version, got {str(out / PROGRESS)!r} of another")
    if values.get("what") != what:
        raise ValueError(f"out must be unfinished by the same data and tokenizer, got {str(out)!r}, begun with others")
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
    """Removes the files of a store without a document."""
    for name in (TOKENS, DOCUMENTS, NAMES, PROGRESS, TOKENIZER):
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
