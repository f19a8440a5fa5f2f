"""Texts that any machine has, as training data of benchmarks: Python's sources, hexdumps of programs, sources in C.

Each row of a batch reads one long document, so no memory is ever cleared. The fingerprint is the SHA-256 of all bytes.
"""

from __future__ import annotations

import functools
import hashlib
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from c_sources import LARGEST_FILE, SUFFIXES
from common import TOY
from numpy.typing import NDArray

from memtrans.data.documents import Document, Shuffled
from memtrans.data.sources import load_corpus
from memtrans.training.data import TrainingData

PROGRAMS = Path("/usr/bin")
MOST = {"hexdump": 32 << 20, "c": 48 << 20}  # bytes of a text
C_ARCHIVE = "MEMTRANS_BENCH_C"  # names an archive that c_sources.py made
C_FOLDERS = (Path(torch.__file__).parent / "include", Path("/usr/include"))  # read where it names none
LINE = 16  # bytes of a program in one line of a dump


def training_data(source: str, batch: int) -> TrainingData:
    """A stretch of a text for each row: of `trained` Python's sources, of `hexdump` and `c` what their names say."""
    content = torch.from_numpy(_content(source))
    documents = [Document(str(row), part) for row, part in enumerate(content.chunk(batch))]
    return TrainingData(Shuffled(documents, seed=0), documents[:1], digest(source))


@functools.cache
def digest(source: str) -> str:
    """The SHA-256 of the text of a source."""
    return hashlib.sha256(_content(source).data).hexdigest()


@functools.cache
def _content(source: str) -> NDArray[np.uint8]:
    if source == "trained":
        return torch.cat([document.content for document in load_corpus("stdlib").train]).numpy()
    parts = {"hexdump": programs, "c": c_files}[source]
    return joined(parts(), 1 << 16 if TOY else MOST[source])


def joined(parts: Iterable[bytes], most: int) -> NDArray[np.uint8]:
    """Parts one behind the other until there are `most` bytes. Raises ValueError where there is none."""
    taken, size = [], 0
    for part in parts:
        taken.append(part)
        size += len(part)
        if size >= most:
            break
    if not size:
        raise ValueError("a benchmark's text must have bytes, got none: this machine has no such files")
    return np.frombuffer(b"".join(taken), dtype=np.uint8).copy()


def programs() -> Iterator[bytes]:
    """Dumps of the programs of this machine, in an order that depends on their names alone."""
    files = [path for path in PROGRAMS.iterdir() if path.is_file() and not path.is_symlink()]
    for path in sorted(files, key=lambda path: hashlib.sha256(path.name.encode()).digest()):
        if path.stat().st_size >= 1 << 14 and os.access(path, os.R_OK):
            yield hexdump(path.read_bytes())


def hexdump(content: bytes) -> bytes:
    """Sixteen bytes a line: where they stand, pairs of them in hexadecimal, and what of them can be printed.

    >>> hexdump(b"memtrans\\n")
    b'00000000: 6d65 6d74 7261 6e73 0a00 0000 0000 0000  memtrans........\\n'
    """
    digits = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
    rows = -(-len(content) // LINE)
    data = np.zeros(rows * LINE, dtype=np.uint8)
    data[: len(content)] = np.frombuffer(content, dtype=np.uint8)
    data = data.reshape(rows, LINE)
    lines = np.full((rows, 68), ord(" "), dtype=np.uint8)
    place = np.arange(rows, dtype=np.int64)[:, None] * LINE
    lines[:, :8] = digits[place >> np.arange(28, -4, -4) & 15]
    lines[:, 8], lines[:, 67] = ord(":"), ord("\n")
    column = 10 + np.arange(LINE) // 2 * 5 + np.arange(LINE) % 2 * 2
    lines[:, column], lines[:, column + 1] = digits[data >> 4], digits[data & 15]
    lines[:, 51:67] = np.where((data >= 32) & (data < 127), data, ord("."))
    return lines.tobytes()


def c_files() -> Iterator[bytes]:
    """Documents of the archive that C_ARCHIVE names, or headers of C and C++ that this machine has, path by path."""
    if archive := os.environ.get(C_ARCHIVE):
        with zipfile.ZipFile(archive) as documents:
            yield from (documents.read(name) for name in sorted(documents.namelist()))
        return
    for folder in C_FOLDERS:
        for path in sorted(folder.rglob("*")):
            if path.suffix in SUFFIXES and path.is_file() and path.stat().st_size <= LARGEST_FILE:
                yield path.read_bytes()
