"""The texts of files, directories and archives, one after another; none of them is held as a whole.

A *text* has a name and comes in pieces of bytes, which are read before the next text is asked for.
"""

from __future__ import annotations

import functools
import gzip
import io
import lzma
import os
import stat
import sysconfig
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path, PurePath
from typing import IO, Any

from memtrans.data.folders import files_below
from memtrans.data.records import (
    COLUMNAR,
    RECORDS,
    Fields,
    Text,
    begins_with_record,
    is_saved_dataset,
    records_of,
)
from memtrans.data.store import STORED, is_store
from memtrans.files import expanded, open_input, parse_json, read_file

STANDARD_LIBRARY = "stdlib"
SAVED_SPLITS = "dataset_dict.json"  # of Hugging Face datasets with several splits
RECORD_FIELDS = Fields()
PIECE = 1 << 20  # bytes
COMPRESSED_PIECE = 1 << 14  # bytes, which may be many more when they are unpacked
SNIFFED = 8192  # bytes looked at to tell text from the rest
LONGEST_WINDOW = 1 << 31  # bytes; of `zstd --long=31`
COMPRESSED = (".gz", ".xz", ".zst")
OTHER_ARCHIVES = {".tar", ".tgz", ".txz", ".tzst", ".tbz", ".tbz2", ".bz2", ".lzma", ".lz4", ".br", ".z", ".7z", ".rar"}
BOOKS = {".pdf", ".epub", ".mobi", ".azw3", ".djvu", ".docx", ".odt"}  # whose text is not in their bytes
EXPANDS = 8  # a compressed file is taken to hold so many times its bytes
UNUSUAL_PACKAGES = {"test", "idlelib", "lib2to3", "site-packages", "dist-packages"}  # not installed everywhere

# RuntimeError: an encrypted archive; NotImplementedError: a compression that Python does not know
UNREADABLE = (
    EOFError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zipfile.BadZipFile,
    zlib.error,
    RuntimeError,
    NotImplementedError,
)


@dataclass(frozen=True)
class Source:
    """Where texts are.

    Attributes:
        data: `stdlib`, or the path of a file or directory. fields: of records. records: False reads files of records
            as text, as runs did whose checkpoints name no way of reading.
    """

    data: str
    fields: Fields = RECORD_FIELDS
    records: bool = True

    @property
    def path(self) -> Path:
        return expanded(self.data)

    def check(self) -> None:
        """Raises FileNotFoundError when there is no such data, ValueError for a file of a store of tokens."""
        if self.data == STANDARD_LIBRARY:
            return
        if not self.data or not self.path.exists():
            expected = f"data must be {STANDARD_LIBRARY!r} or the path of a file or directory"
            raise FileNotFoundError(f"no such file: {expected}, got {self.data!r}")
        if self.path.name in STORED and is_store(self.path.parent):
            raise ValueError(f"data must be the directory of a store of tokens, got {self.data!r}, a file of it")

    def files(self) -> list[Path]:
        """The files that may be read; none of the standard library."""
        if self.data == STANDARD_LIBRARY:
            return []
        return files_below(self.path) if self.path.is_dir() else [self.path]

    def size(self) -> int:
        """About how many bytes its texts have."""
        return sum(_expanded(file) for file in self.files())

    def is_pipe(self) -> bool:
        """Whether it can be read once only."""
        return self.data != STANDARD_LIBRARY and stat.S_ISFIFO(os.stat(self.path).st_mode)

    def has_splits(self) -> bool:
        """Whether it says itself what is held out: names then begin with the split's."""
        return self.records and (self.path / SAVED_SPLITS).is_file()

    def texts(self) -> Iterator[Text]:
        """Its texts, always in the same order. Raises OSError, or ValueError where a file is damaged."""
        self.check()
        if self.data == STANDARD_LIBRARY:
            return _of_standard_library()
        if not self.path.is_dir():
            return self._of_file(self.path.name, self.path, sniffed=False)
        if self.has_splits():
            return self._of_splits()
        if self.records and is_saved_dataset(self.path):
            return records_of(self.path.name, self.path, None, None, self.fields)
        return self._of_folder()

    def _of_splits(self) -> Iterator[Text]:
        index = parse_json(read_file(SAVED_SPLITS, self.path / SAVED_SPLITS))
        splits = index.get("splits") if isinstance(index, dict) else None
        if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
            raise ValueError(f"data must name its splits in {SAVED_SPLITS}, got {str(self.path)!r} without")
        for split in splits:
            for text in records_of(split, self.path / split, None, None, self.fields):
                yield Text(f"{split}/{text.name}", text.pieces)

    def _of_folder(self) -> Iterator[Text]:
        files = self.files()
        datasets = {path for path in {file.parent for file in files} if self.records and is_saved_dataset(path)}
        with_splits = {str(path.parent) for path in datasets if (path.parent / SAVED_SPLITS).is_file()}
        if with_splits:
            raise ValueError(
                f"data must be a dataset with splits itself, got {self.data!r}, which holds one in {min(with_splits)!r}"
            )
        for name, of_entry in groupby(files, key=lambda file: file.relative_to(self.path).parts[0]):
            yield from self._of_entry(name, list(of_entry), datasets)

    def _of_entry(self, name: str, files: Sequence[Path], datasets: Set[Path]) -> Iterator[Text]:
        """The texts of a file in the directory; of a directory in it the one that its files are, and its records."""
        if files[0] == self.path / name:
            yield from self._of_file(name, files[0], sniffed=True)
            return
        records = [self._records(file, datasets) for file in files]
        plain = (file for file, of_records in zip(files, records, strict=True) if of_records is None)
        yield Text(name, (piece for file in plain for text in self._of_file("", file, True) for piece in text.pieces))
        for path in dict.fromkeys(path for path in records if path is not None):
            if path in datasets:
                yield from records_of(str(path.relative_to(self.path)), path, None, None, self.fields)
            else:
                yield from self._of_file(str(path.relative_to(self.path)), path, sniffed=True)

    def _records(self, file: Path, datasets: Set[Path]) -> Path | None:
        """The records that a file belongs to: a saved dataset that it lies in, or itself; None of a text."""
        saved = next((path for path in file.parents if path in datasets), None)
        return saved or (file if self.records and _suffix(file) in RECORDS else None)

    def _of_file(self, name: str, file: Path, sniffed: bool) -> Iterator[Text]:
        """The texts of a file; `sniffed`: none where it is no text."""
        if not sniffed and _suffix(file) in OTHER_ARCHIVES:
            packed = ", ".join((*COMPRESSED, ".zip"))
            raise ValueError(f"data must be text, or packed as {packed}, got {str(file)!r}, another archive")
        if not sniffed and _suffix(file) in BOOKS:
            raise ValueError(f"data must be text, got {str(file)!r}, which has to be converted to plain text first")
        with _damage_told(file), open_input("data", file) as raw:
            if _packing(file) == ".zip":
                yield from self._members(name, file, raw)
                return
            yield from self._of_content(name, file, file, raw, sniffed)

    def _members(self, name: str, file: Path, raw: IO[bytes]) -> Iterator[Text]:
        """The texts of an archive's members that are not hidden, in path order."""
        with zipfile.ZipFile(raw) as archive:
            for member in sorted(archive.infolist(), key=lambda member: member.filename):
                if member.filename.endswith("/") or _is_hidden(PurePath(member.filename)):
                    continue
                with archive.open(member) as content:
                    path = file / member.filename
                    yield from self._of_content(f"{name}/{member.filename}", file, path, content, sniffed=True)

    def _of_content(self, name: str, file: Path, path: Path, raw: IO[bytes], sniffed: bool) -> Iterator[Text]:
        """The texts of a file, or of the member of an archive `file` with this path."""
        suffix, packed = _suffix(path), path if _packing(path) in COMPRESSED else file
        with _plain(raw, path) as content:
            if self.records and suffix in RECORDS:
                lines = None if suffix in COLUMNAR else _told(packed, content)
                yield from records_of(name, path, content, lines, self.fields)
                return
            pieces = _told(packed, _pieces(content))
            first = next(pieces, b"")
            if self.records and suffix == ".json" and begins_with_record(first, self.fields):
                _warn_of_lines(self.data)
            if not sniffed or (suffix not in BOOKS and _is_text(first)):
                yield Text(name, chain([first], pieces))


def standard_library_files() -> Iterator[tuple[str, Sequence[Path]]]:
    """The sources of the running Python's own library: names with files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for entry in sorted(root.iterdir()):
        if entry.is_dir() and entry.name not in UNUSUAL_PACKAGES and (entry / "__init__.py").exists():
            yield entry.name, sorted(f for f in entry.rglob("*.py") if UNUSUAL_PACKAGES.isdisjoint(f.parts))
        elif entry.suffix == ".py":
            yield entry.stem, [entry]


def _of_standard_library() -> Iterator[Text]:
    for name, files in standard_library_files():
        yield Text(name, (file.read_bytes() for file in files))


def _suffix(file: Path) -> str:
    """What a file holds, compressed or not.

    >>> _suffix(Path("texts.jsonl.gz"))
    '.jsonl'
    """
    return Path(file.stem).suffix.lower() if _packing(file) in COMPRESSED else _packing(file)


def _packing(file: Path) -> str:
    return file.suffix.lower()


def _expanded(file: Path) -> int:
    size = file.stat().st_size
    return size * EXPANDS if _packing(file) in (*COMPRESSED, ".zip", ".parquet") else size


@contextmanager
def _damage_told(file: Path) -> Iterator[None]:
    """Turns what damaged archives raise into ValueError."""
    try:
        yield
    except UNREADABLE as error:
        raise ValueError(f"data must hold whole {file.suffix} archives, got {str(file)!r}: {error}") from error


@contextmanager
def _plain(raw: IO[bytes], file: Path) -> Iterator[IO[bytes]]:
    """The content of a file that may be compressed."""
    if _packing(file) == ".gz":
        with gzip.open(raw) as content:
            yield io.BufferedReader(content, PIECE)
    elif _packing(file) == ".xz":
        with lzma.open(raw) as content:
            yield io.BufferedReader(content, PIECE)
    elif _packing(file) == ".zst":
        with _zstandard(raw, file) as content:
            yield content
    else:
        yield raw


@contextmanager
def _zstandard(raw: IO[bytes], file: Path) -> Iterator[IO[bytes]]:
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(
            f"data must hold no .zst where zstandard is missing, got {str(file)!r}: pip install 'memtrans[text]' "
            f"({error})"
        ) from error
    decompressor = zstandard.ZstdDecompressor(max_window_size=LONGEST_WINDOW)
    yield io.BufferedReader(_Frames(raw, decompressor.decompressobj, zstandard.ZstdError), PIECE)


class _Frames(io.RawIOBase):
    """The content of a file's frames; unlike the library's own reader it misses the end of one that was cut off."""

    def __init__(self, raw: IO[bytes], begin: Callable[[], Any], damage: type[Exception]) -> None:
        super().__init__()
        self._raw, self._begin, self._damage, self._frame = raw, begin, damage, begin()
        self._ready, self._taken, self._started = b"", 0, False

    def readable(self) -> bool:
        return True

    def readinto(self, place: Any) -> int:
        while self._taken == len(self._ready):
            if not self._more():
                return 0
        length = min(len(place), len(self._ready) - self._taken)
        place[:length] = self._ready[self._taken : self._taken + length]
        self._taken += length
        return length

    def _more(self) -> bool:
        """Makes more of the content ready; False at the end. Raises EOFError where a frame has none, or is damaged."""
        compressed = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame, self._started = self._begin(), False
        compressed = compressed or self._raw.read(COMPRESSED_PIECE)
        if not compressed and self._started:
            raise EOFError("the file ends before its content does")
        self._started = self._started or bool(compressed)
        try:
            self._ready, self._taken = self._frame.decompress(compressed) if compressed else b"", 0
        except self._damage as error:
            raise EOFError(str(error)) from error
        return bool(compressed)


def _pieces(content: IO[bytes]) -> Iterator[bytes]:
    while piece := content.read(PIECE):
        yield piece


def _told(file: Path, parts: Iterable[bytes]) -> Iterator[bytes]:
    """Lines or pieces of a file, which are read long after it was opened; its damage is told wherever it shows."""
    with _damage_told(file):
        yield from parts


@functools.cache
def _warn_of_lines(data: str) -> None:
    """Says once of a source that records are learned from as JSON."""
    warnings.warn(
        f"data {data!r} has .json files with a record in each line, which are read as texts: called .jsonl, each "
        "record is a document",
        stacklevel=2,
    )


def _is_hidden(path: PurePath) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_text(beginning: bytes) -> bool:
    """Whether no byte of the beginning is 0, which is how git tells text from the rest."""
    return b"\0" not in beginning[:SNIFFED]
