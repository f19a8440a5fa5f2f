"""A store of tokens: a directory whose files are mapped into memory, however long the texts are.

tokens.bin      the tokens of all documents, one after another: uint8, uint16 or uint32, the smallest that holds V
documents.bin   a row for each document: where its name, its tokens and its bytes end, and the SHA-256 of its bytes
names.bin       the names, one after another
tokenizer.json  what made the tokens; missing where tokens are bytes
store.json      the files with their lengths and SHA-256; written last, and at once: it makes the directory a store
progress.json   until then: how far the writing has come, for the same command to go on from there
.lock           locked while a process writes

Shapes: V tokens of the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from memtrans.annotations import allows
from memtrans.data.documents import Document, contents_of
from memtrans.data.tokens import BYTES, Tokenizer, tokenizer_of
from memtrans.data.tokens import FILE as TOKENIZER
from memtrans.files import MOST_JSON, check_file, parse_json, read_file

KIND = "memtrans.tokens"
VERSION = 1
INDEX, PROGRESS = "store.json", "progress.json"
TOKENS, DOCUMENTS, NAMES = "tokens.bin", "documents.bin", "names.bin"
STORED = (INDEX, TOKENS, DOCUMENTS, NAMES, TOKENIZER)
MOST_TOKENS = 2**31  # of a document
MOST_HASHED = 256 << 20  # bytes of a file that are hashed when a store is opened; of a longer one the length is checked
HASHED_AT_ONCE = 1 << 20  # bytes
ROW = np.dtype([("name_end", "<i8"), ("token_end", "<i8"), ("byte_end", "<i8"), ("digest", "u1", 32)])


def token_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The smallest kind of number that holds every token.

    >>> token_dtype(BYTES)
    dtype('uint8')
    """
    if tokenizer is BYTES:
        return np.dtype(np.uint8)
    return np.dtype("<u2") if tokenizer.vocabulary <= 2**16 else np.dtype("<u4")


def is_store(path: str | Path) -> bool:
    """Whether there is a store, whole, damaged or unfinished; files that others called so make none."""
    return any(_is_ours(Path(path) / name) for name in (INDEX, PROGRESS))


def _is_ours(file: Path) -> bool:
    if not file.is_file():
        return False
    try:
        values = parse_json(read_file(file.name, file, MOST_JSON))
    except ValueError:
        return any((file.parent / name).is_file() for name in (TOKENS, DOCUMENTS, NAMES))
    return isinstance(values, dict) and values.get("kind") == KIND


class Store:
    """The documents of a store, mapped into memory.

    path: of its directory.

    Attributes:
        tokenizer: what made the tokens. sizes, lengths, digests: of each document, see `documents.Library`.
        fingerprint: of the corpus. contents: see `documents.contents_of`. way: how documents are held out, see
            `held_out.way_of`.

    Raises FileNotFoundError where there is none, ValueError where it is damaged, of another version or not yet whole.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = _read_index(self.path)
        _check_files(self.path, index["files"])
        has_tokenizer = TOKENIZER in index["files"]
        content = read_file("tokenizer", self.path / TOKENIZER, MOST_JSON) if has_tokenizer else b""
        self.tokenizer = tokenizer_of(content, str(self.path / TOKENIZER))
        self.fingerprint, self.way = index["fingerprint"], index["way"]
        rows = _mapped(self.path / DOCUMENTS, ROW)
        self._name_ends, self._token_ends = (
            np.ascontiguousarray(rows["name_end"]),
            np.ascontiguousarray(rows["token_end"]),
        )
        self.sizes = np.diff(rows["byte_end"], prepend=0)
        self.lengths = np.diff(self._token_ends, prepend=0)
        self.digests: NDArray[np.uint8] = rows["digest"]
        self.contents = contents_of(self.digests)
        self._names = _mapped(self.path / NAMES, np.dtype(np.uint8))
        self._tokens = torch.from_numpy(_mapped(self.path / TOKENS, token_dtype(self.tokenizer)))
        self._check()

    def _check(self) -> None:
        """Raises ValueError where documents do not lie one after another, or a token is none of the vocabulary."""
        ends = ((self._token_ends, len(self._tokens)), (self._name_ends, len(self._names)))
        whole = len(self) > 0 and all(
            found[-1] == size and (np.diff(found, prepend=0) >= 0).all() for found, size in ends
        )
        if not whole or (self.sizes < 0).any():
            raise ValueError(f"store must hold the documents that it names, got others in {str(self.path)!r}")
        if 0 < self._tokens.nbytes <= MOST_HASHED and self.tokenizer is not BYTES:
            largest = int(self._tokens.numpy().max())
            if largest >= self.tokenizer.vocabulary:
                raise ValueError(
                    f"store must hold tokens below {self.tokenizer.vocabulary}, got {largest} in {str(self.path)!r}"
                )

    def __len__(self) -> int:
        return len(self.lengths)

    def name(self, index: int) -> str:
        """Of a document."""
        start = int(self._name_ends[index - 1]) if index else 0
        return self._names[start : int(self._name_ends[index])].tobytes().decode(errors="surrogateescape")

    def document(self, index: int) -> Document:
        """One of the documents; its tokens are read when they are looked at."""
        end = int(self._token_ends[index])
        content = self._tokens[end - int(self.lengths[index]) : end]
        return Document(self.name(index), content, tokenizer=self.tokenizer)


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="c")  # a copy on writing: PyTorch warns of what cannot be written


def write_index(path: Path, index: dict[str, Any]) -> bytes:
    """The content of `store.json` for files that are written: their lengths and hashes are added here."""
    names = [TOKENS, DOCUMENTS, NAMES, *([TOKENIZER] if (path / TOKENIZER).exists() else [])]
    files = {name: {"bytes": (path / name).stat().st_size, "sha256": _digest(path / name)} for name in names}
    index = {"kind": KIND, "version": VERSION, **index, "files": files}
    index["sha256"] = _index_digest(index)
    return (json.dumps(index, indent=1) + "\n").encode()


def _read_index(path: Path) -> dict[str, Any]:
    shown = repr(str(path))
    if not (path / INDEX).is_file():
        if (path / PROGRESS).is_file():
            raise ValueError(
                f"store must be whole, got {shown}, where tokenizing has not ended: the same command goes on"
            )
        raise FileNotFoundError(f"store must be a directory with {INDEX}, got {shown}")
    try:
        index = parse_json(read_file(INDEX, path / INDEX, MOST_JSON))
    except ValueError as error:
        raise ValueError(f"store must have a whole {INDEX}, got {shown}: {error}") from error
    if not isinstance(index, dict) or index.get("kind") != KIND:
        raise ValueError(f"store must be one of memtrans, got {shown} of another kind")
    if index.get("version") != VERSION:
        raise ValueError(f"store must be of version {VERSION}, got {index.get('version')} in {shown}")
    if index.pop("sha256", None) != _index_digest(index):
        raise ValueError(f"store must be whole, got {shown}, whose {INDEX} was changed since it was written")
    if not isinstance(index.get("files"), dict) or not all(
        isinstance(index.get(n), str) for n in ("fingerprint", "way")
    ):
        raise ValueError(f"store must name its files, its fingerprint and its way, got {shown} without")
    return index


def _check_files(path: Path, files: Mapping[str, Any]) -> None:
    """Raises ValueError for a file that is missing, cut off or changed."""
    for name in (TOKENS, DOCUMENTS, NAMES, *([TOKENIZER] if TOKENIZER in files else [])):
        file = files.get(name)
        if not isinstance(file, dict) or not allows(int, file.get("bytes")):
            raise ValueError(f"store must name its files, got {str(path)!r} without {name}")
        try:
            check_file(name, path / name)
            size = (path / name).stat().st_size
        except FileNotFoundError as error:
            raise ValueError(f"store must be whole, got {str(path)!r}, where {name} is missing") from error
        if size != file["bytes"]:
            raise ValueError(
                f"store must be whole, got {str(path)!r}, where {name} has {size} of {file['bytes']} bytes"
            )
        if size <= MOST_HASHED and _digest(path / name) != file.get("sha256"):
            raise ValueError(f"store must be whole, got {str(path)!r}, where {name} was changed since it was written")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(HASHED_AT_ONCE):
            digest.update(piece)
    return digest.hexdigest()


def _index_digest(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
