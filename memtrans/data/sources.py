"""Where documents come from: files, directories, archives, the Python standard library's own sources."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import sysconfig
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import torch

from memtrans.data.documents import Document
from memtrans.files import read_input

STANDARD_LIBRARY = "stdlib"
READING = 2  # how documents are held out and shared out to rows; a checkpoint keeps the number of its run
ENWIK8_SPLIT = (90_000_000, 5_000_000, 5_000_000)
HELD_OUT_SHARE = 0.05  # of the bytes of several documents
HELD_OUT_END = 0.1  # of a single document
SNIFFED = 8192  # bytes looked at to tell text from the rest
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
class Corpus:
    """Documents to learn from and documents held out.

    Attributes:
        name: what was asked for. train, validation, test: the documents; test is empty but for enwik8.
        documents: all of them, whole. fingerprint: of every name and byte; two corpora with the same one are the same.
    """

    name: str
    train: Sequence[Document]
    validation: Sequence[Document]
    test: Sequence[Document]
    documents: Sequence[Document]
    fingerprint: str


def load_corpus(data: str, reading: int = READING) -> Corpus:
    """Reads all documents of a source and holds some out, always the same ones.

    Documents of the same text are held out together, or not at all.

    Args:
        data: `stdlib`; or a file (.gz and .xz are unpacked, and of a .zip each member that is text is a document); or a
            directory: each of its text files is a document, and so is each directory in it, all text files below it in
            path order. A file called enwik8 (or enwik8.zip, ...) gets the standard split of 90, 5 and 5 million.
        reading: 1 reads as runs did whose checkpoints name no way: it holds documents out by their names alone.

    Raises:
        FileNotFoundError: no such path. ValueError: no bytes in it, a damaged archive, or an enwik8 of the wrong
        length.
    """
    path = Path(data).expanduser()
    if data == STANDARD_LIBRARY:
        documents = standard_library()
    elif data and path.is_dir():  # an empty path would be the current directory
        documents = [document for entry in sorted(path.iterdir()) for document in _of_entry(path, entry)]
    elif data and path.exists():
        documents = list(_unpacked(path.name, path))
    else:
        expected = f"data must be {STANDARD_LIBRARY!r} or the path of a file or directory"
        raise FileNotFoundError(f"no such file: {expected}, got {data!r}")
    documents = [document for document in documents if len(document) >= 2]
    if not documents:
        raise ValueError(f"data must hold text of at least 2 bytes, got none in {data!r}")
    digests = [document.digest() for document in documents]
    fingerprint = _fingerprint(documents, digests) if reading > 1 else _first_fingerprint(documents)
    if path.name.split(".")[0] == "enwik8" and not path.is_dir():
        return Corpus(data, *_enwik8(data, documents), documents, fingerprint)
    alike = digests if reading > 1 else [str(index).encode() for index in range(len(documents))]
    return Corpus(data, *_split(documents, alike), documents, fingerprint)


def standard_library() -> list[Document]:
    """The sources of the running Python's own library: a package is a document, and so is a top-level module.

    >>> "json" in [document.name for document in standard_library()]
    True
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for entry in sorted(root.iterdir()):
        if entry.is_dir() and entry.name not in UNUSUAL_PACKAGES and (entry / "__init__.py").exists():
            files = sorted(file for file in entry.rglob("*.py") if UNUSUAL_PACKAGES.isdisjoint(file.parts))
            documents.append(Document.of(entry.name, b"".join(file.read_bytes() for file in files)))
        elif entry.suffix == ".py":
            documents.append(Document.of(entry.stem, entry.read_bytes()))
    return documents


def _of_entry(root: Path, entry: Path) -> Iterator[Document]:
    """The documents of a file in the directory `root`, or the one that a directory in it is."""
    if not entry.is_dir():
        yield from _text_in(root, entry)
        return
    texts = [document.content for file in sorted(entry.rglob("*")) for document in _text_in(root, file)]
    if texts:
        yield Document(entry.name, torch.cat(texts))


def _text_in(root: Path, file: Path) -> Iterator[Document]:
    """The text in a file; nothing if it is hidden or not text."""
    relative = file.relative_to(root)
    if file.is_file() and not _is_hidden(relative):
        yield from (document for document in _unpacked(str(relative), file) if _is_text(document))


def _is_hidden(path: PurePath) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_text(document: Document) -> bool:
    """Whether no byte of the beginning is 0, which is how git tells text from the rest."""
    return bool((document.content[:SNIFFED] != 0).all())


def _unpacked(name: str, file: Path) -> Iterator[Document]:
    """The documents of a file: one, or those members of a zip archive that are text and not hidden, in path order."""
    content = read_input("data", file)
    try:
        if file.suffix == ".gz":
            yield Document.of(name, gzip.decompress(content))
        elif file.suffix == ".xz":
            yield Document.of(name, lzma.decompress(content))
        elif file.suffix == ".zip":
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                members = (Document.of(f"{name}/{member}", archive.read(member)) for member in _members(archive))
                yield from filter(_is_text, members)
        else:
            yield Document.of(name, content)
    except UNREADABLE as error:
        raise ValueError(f"data must hold whole {file.suffix} archives, got {str(file)!r}: {error}") from error


def _members(archive: zipfile.ZipFile) -> list[str]:
    """The files in an archive that are not hidden."""
    return [name for name in sorted(archive.namelist()) if not name.endswith("/") and not _is_hidden(PurePath(name))]


def _fingerprint(documents: Sequence[Document], digests: Sequence[bytes]) -> str:
    """Of names and contents, whose digests are known."""
    digest = hashlib.sha256()
    for document, of_content in zip(documents, digests, strict=True):
        digest.update(f"{document.name}\0{len(document)}\0".encode(errors="surrogateescape"))
        digest.update(of_content)
    return digest.hexdigest()


def _first_fingerprint(documents: Sequence[Document]) -> str:
    """As checkpoints hold it that name no way of reading."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.name}\0{len(document)}\0".encode(errors="surrogateescape"))
        digest.update(document.content.numpy().data)
    return digest.hexdigest()


def _enwik8(data: str, documents: Sequence[Document]) -> tuple[list[Document], list[Document], list[Document]]:
    """The split of enwik8 that everybody reports, one document each."""
    sizes = [len(document) for document in documents]
    if sizes != [sum(ENWIK8_SPLIT)]:
        raise ValueError(f"data must be one file of {sum(ENWIK8_SPLIT)} bytes to be enwik8, got {sizes} in {data!r}")
    train, validation, test = documents[0].content.split(ENWIK8_SPLIT)
    return [Document("train", train)], [Document("validation", validation)], [Document("test", test)]


def _split(
    documents: Sequence[Document], alike: Sequence[bytes]
) -> tuple[list[Document], list[Document], list[Document]]:
    """Holds out whole documents, drawn by the hash of their names; of a single document its end.

    alike: of each document; those with the same one stay together.
    """
    groups: dict[bytes, list[int]] = {}
    for index, key in enumerate(alike):
        groups.setdefault(key, []).append(index)
    if len(groups) == 1:
        return _split_single(documents)
    drawn = sorted(groups.values(), key=lambda group: min(_draw(documents[index]) for index in group))
    share = int(sum(map(len, documents)) * HELD_OUT_SHARE)

    def size_of(group: Iterable[int]) -> int:
        return sum(len(documents[index]) for index in group)

    chosen: set[int] = set()
    size = 0
    for group in drawn:
        if size < share and size + size_of(group) <= 2 * share:
            chosen.update(group)
            size += size_of(group)
    chosen = chosen or set(min(drawn, key=size_of))
    train = [document for index, document in enumerate(documents) if index not in chosen]
    return train, [documents[index] for index in sorted(chosen)], []


def _split_single(documents: Sequence[Document]) -> tuple[list[Document], list[Document], list[Document]]:
    """Holds out the end of a document; of copies of it the first one is read."""
    only = documents[0]
    if len(documents) > 1:
        warnings.warn(f"data holds one text {len(documents)} times, of which {only.name!r} is read", stacklevel=4)
    end = max(2, int(len(only) * HELD_OUT_END))
    if len(only) < end + 2:
        raise ValueError(f"data must hold at least 4 bytes, got {len(only)} in {only.name!r}")
    held_out = only.part(f"{only.name} (its end)", len(only) - end, len(only))
    return [only.part(only.name, 0, len(only) - end)], [held_out], []


def _draw(document: Document) -> bytes:
    return hashlib.sha256(document.name.encode(errors="surrogateescape")).digest()
