"""Tokens: bytes by themselves, or the vocabulary of a Hugging Face `tokenizer.json`.

Nothing is lost on the way: what a tokenizer made of a text is compared with the text, and where it lost something, or
where bytes are no UTF-8, those characters become the tokens of single bytes. A tokenizer without such tokens is refused
at that place. So every token stands for some bytes, and bits per byte can be compared between tokenizers.

Shapes: V tokens of the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from memtrans.files import MOST_JSON, expanded, parse_json, read_file

Ids = NDArray[Any]

FILE = "tokenizer.json"
CHUNK = 1 << 16  # bytes of text that are made tokens at once; tokens do not reach over its end
CHANGES_TEXT = {"Prepend", "NFC", "NFD", "NFKC", "NFKD", "Strip"}  # normalizers that are left out
ESCAPED = re.compile("([\udc80-\udcff]+)")  # bytes that are no UTF-8, as Python writes them in strings
WORD_START = "\u2581"  # stands for a space in vocabularies of SentencePiece
MOST_TOKENS = 2**24  # of a vocabulary: numbers beyond would take gigabytes to look up
MOST_SHOWN = 40  # characters of a text that an error shows


class Tokenizer(Protocol):
    """How a text becomes tokens, and tokens bytes.

    Attributes:
        vocabulary: V. digest: `bytes`, or the SHA-256 of the file. sizes: (V,) int64, bytes of each token.
        content: the tokenizer.json; empty for bytes.
    """

    vocabulary: int
    digest: str
    sizes: NDArray[np.int64]
    content: bytes

    def encode(self, text: bytes) -> Ids:
        """The tokens of a text."""

    def encode_chunks(self, chunks: Sequence[bytes]) -> list[Ids]:
        """The tokens of each of several texts."""

    def decode(self, tokens: Any) -> bytes:
        """The bytes of tokens: a sequence, an array or a tensor on the CPU."""


class ByteTokenizer:
    """Tokens are bytes.

    >>> BYTES.encode(b"hi").tolist(), BYTES.decode([104, 105])
    ([104, 105], b'hi')
    """

    vocabulary, digest, content = 256, "bytes", b""
    sizes = np.ones(256, dtype=np.int64)

    def encode(self, text: bytes) -> Ids:
        return np.frombuffer(text, dtype=np.uint8)

    def encode_chunks(self, chunks: Sequence[bytes]) -> list[Ids]:
        return [self.encode(chunk) for chunk in chunks]

    def decode(self, tokens: Any) -> bytes:
        return np.asarray(tokens).astype(np.uint8).tobytes()


BYTES = ByteTokenizer()


class FileTokenizer:
    """The tokenizer of a `tokenizer.json`.

    content: of the file. source: its path, for errors.

    Raises ValueError when it is no tokenizer, or the library `tokenizers` is missing.
    """

    def __init__(self, content: bytes, source: str = FILE) -> None:
        self.content, self.source = content, source
        self.digest = hashlib.sha256(content).hexdigest()
        description = _description(content, source)
        self._tokenizer = _library().Tokenizer.from_str(json.dumps(description))
        by_token = self._tokenizer.get_vocab(with_added_tokens=True)
        added = {token["content"] for token in description.get("added_tokens") or []}
        largest = max(by_token.values(), default=0)
        if largest >= MOST_TOKENS:
            raise ValueError(f"tokenizer must number its tokens below {MOST_TOKENS}, got {largest} in {source!r}")
        self.vocabulary = max(BYTES.vocabulary, largest + 1)  # numbers without a token stand for nothing
        pieces = [b""] * self.vocabulary
        for token, number in by_token.items():
            pieces[number] = token.encode() if token in added else _bytes_of(token, _has(description, "ByteLevel"))
        self.sizes = np.array([len(piece) for piece in pieces], dtype=np.int64)
        self._starts = np.cumsum(self.sizes) - self.sizes
        self._flat = np.frombuffer(b"".join(pieces), dtype=np.uint8)
        self.dtype = np.uint16 if self.vocabulary <= 2**16 else np.uint32
        single = {piece: number for number, piece in reversed(list(enumerate(pieces))) if len(piece) == 1}
        self._bytes = {value: single.get(bytes([value])) for value in range(256)}

    def encode(self, text: bytes) -> Ids:
        """The tokens of a text of any length, cut as `chunks_of` does."""
        found = self.encode_chunks(list(chunks_of([text])))
        return np.concatenate(found) if found else np.zeros(0, dtype=self.dtype)

    def encode_chunks(self, chunks: Sequence[bytes]) -> list[Ids]:
        """The tokens of each of several short texts, on all cores. Raises ValueError where bytes would be lost."""
        strings = [_text(chunk) for chunk in chunks]
        whole = self._tokenizer.encode_batch_fast([text or "" for text in strings], add_special_tokens=False)
        found = []
        for chunk, string, encoding in zip(chunks, strings, whole, strict=True):
            tokens = np.array(encoding.ids, dtype=self.dtype)
            if string is None:
                tokens = self._runs(chunk)
            found.append(tokens if self.decode(tokens) == chunk else self._halves(chunk))
        return found

    def _runs(self, text: bytes) -> Ids:
        """The tokens of what is UTF-8 in a text, and the single bytes of what is none, by turns."""
        runs = [run.encode(errors="surrogateescape") for run in ESCAPED.split(text.decode(errors="surrogateescape"))]
        found = [np.zeros(0, dtype=self.dtype)] * len(runs)
        found[::2] = self.encode_chunks(runs[::2])
        found[1::2] = [self._single_bytes(run) for run in runs[1::2]]
        return np.concatenate(found)

    def _halves(self, text: bytes) -> Ids:
        """The tokens of both halves of a text that the tokenizer does not give back; at last its single bytes."""
        middle = _character(text, len(text) // 2)
        if middle == 0:
            return self._single_bytes(text)
        return np.concatenate([self._exact(text[:middle]), self._exact(text[middle:])])

    def _exact(self, text: bytes) -> Ids:
        """The tokens of a text that is UTF-8, halved where the tokenizer does not give it back."""
        tokens = np.array(self._tokenizer.encode(text.decode(), add_special_tokens=False).ids, dtype=self.dtype)
        return tokens if self.decode(tokens) == text else self._halves(text)

    def _single_bytes(self, text: bytes) -> Ids:
        tokens = [self._bytes[value] for value in text]
        if None in tokens:
            shown = text.decode(errors="backslashreplace")[:MOST_SHOWN]
            raise ValueError(
                f"tokenizer must give every text back, or have tokens for single bytes, got {self.source!r}, "
                f"which loses {shown!r}"
            )
        return np.array(tokens, dtype=self.dtype)

    def decode(self, tokens: Any) -> bytes:
        tokens = np.asarray(tokens).astype(np.int64)
        sizes = self.sizes[tokens]
        ends = np.cumsum(sizes)
        if not len(tokens):
            return b""
        places = np.repeat(self._starts[tokens] - (ends - sizes), sizes) + np.arange(ends[-1])
        return self._flat[places].tobytes()


def open_tokenizer(name: str | None) -> Tokenizer:
    """The tokenizer of a name: None or `bytes`, a tokenizer.json, or a directory that holds one.

    Raises FileNotFoundError or ValueError where there is none.

    >>> open_tokenizer("bytes").vocabulary
    256
    """
    if name is None or name == BYTES.digest:
        return BYTES
    path = expanded(name)
    path = path / FILE if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"tokenizer must be bytes, a tokenizer.json or a directory with one, got {name!r}")
    return FileTokenizer(read_file("tokenizer", path, MOST_JSON), str(path))


def tokenizer_of(content: bytes, source: str) -> Tokenizer:
    """The tokenizer of a file's content; bytes where that is empty. Raises ValueError where it is none."""
    return _cached(content, source) if content else BYTES


@lru_cache(maxsize=2)
def _cached(content: bytes, source: str) -> Tokenizer:
    return FileTokenizer(content, source)


def train_vocabulary(texts: Iterable[bytes], size: int) -> bytes:
    """The tokenizer.json of a byte-level vocabulary of so many tokens, learned from texts by merging frequent pairs.

    Raises ValueError as `check_learnable` does.
    """
    check_learnable(size)
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(alphabet), show_progress=False)
    strings = (chunk.decode(errors="replace") for chunk in chunks_of(texts))
    tokenizer.train_from_iterator(strings, trainer)
    return str(tokenizer.to_str()).encode()


def chunks_of(pieces: Iterable[bytes], cuts: Sequence[int] = ()) -> Iterator[bytes]:
    """A text that comes in pieces, in chunks of at most CHUNK bytes that end with a line, a word or a character.

    cuts: places where a chunk ends in any case.

    >>> list(chunks_of([b"one ", b"two"], cuts=[2]))
    [b'on', b'e two']
    """
    rest, at, pending = b"", 0, list(cuts)
    for piece in pieces:
        rest = rest + piece if rest else piece
        start = 0
        while len(rest) - start >= CHUNK:
            end = _end(rest, start, pending, at)
            yield rest[start:end]
            at, start = at + end - start, end
        rest = rest[start:]
    start = 0
    while start < len(rest):
        end = _end(rest, start, pending, at)
        yield rest[start:end]
        at, start = at + end - start, end


def _end(text: bytes, start: int, cuts: list[int], at: int) -> int:
    """Where the chunk that begins at `start`, place `at` of the whole text, ends; takes a cut out that it reached."""
    most = min(len(text), start + CHUNK)
    if cuts and cuts[0] <= at + most - start:
        return start + cuts.pop(0) - at
    if len(text) - start <= CHUNK and most == len(text) and len(text) - start < CHUNK:
        return most
    for mark in (b"\n", b" "):
        if (found := text.rfind(mark, start, most)) >= 0:
            return found + 1
    return start + (_character(text[start:most], most - start - 1) or most - start)


def _character(text: bytes, place: int) -> int:
    """The place, or the nearest one before it, where a character of UTF-8 begins; the place itself where none does."""
    for back in range(min(4, place + 1)):
        if text[place - back] & 0xC0 != 0x80:
            return place - back
    return place


def _text(content: bytes) -> str | None:
    """The content as a string; None where it is no UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def check_learnable(size: int) -> None:
    """Raises ValueError for a vocabulary that cannot be learned: below 256, which all bytes need, or above 2^24.

    So it does where the library that learns it is missing.
    """
    if size < BYTES.vocabulary:
        raise ValueError(f"train_vocabulary must be at least {BYTES.vocabulary}, a token for each byte, got {size}")
    if size > MOST_TOKENS:
        raise ValueError(f"train_vocabulary must be at most {MOST_TOKENS}, got {size}")
    _library()


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(
            f"tokenizer must be bytes without tokenizers: pip install 'memtrans[text]' ({error})"
        ) from error
    return tokenizers


def _description(content: bytes, source: str) -> dict[str, Any]:
    """What a tokenizer.json says, without what changes, cuts or fills up a text."""
    try:
        description = parse_json(content)
        _library().Tokenizer.from_str(content.decode())
    except (ValueError, TypeError) as error:
        if "pip install" in str(error):
            raise
        raise ValueError(f"tokenizer must be a tokenizer.json, got {source!r}: {error}") from error
    except Exception as error:  # the library has no class for it
        raise ValueError(f"tokenizer must be a tokenizer.json, got {source!r}: {error}") from error
    description |= {"truncation": None, "padding": None, "post_processor": None}
    description["normalizer"] = _keeping_text(description.get("normalizer"))
    for part in _parts(description.get("pre_tokenizer"), "pretokenizers"):
        if part.get("type") == "Metaspace":
            part["prepend_scheme"] = "never"
        if part.get("type") == "ByteLevel":
            part["add_prefix_space"] = False
    if "dropout" in description["model"]:
        description["model"]["dropout"] = None
    return dict(description)


def _keeping_text(normalizer: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer without the steps that change what a text says."""
    kept = [part for part in _parts(normalizer, "normalizers") if part.get("type") not in CHANGES_TEXT]
    return {"type": "Sequence", "normalizers": kept} if kept else None


def _parts(step: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The steps of a sequence, or the step itself."""
    if step is None:
        return []
    if step.get("type") == "Sequence":
        return [part for member in step.get(name, []) for part in _parts(member, name)]
    return [step]


def _has(description: dict[str, Any], kind: str) -> bool:
    """Whether tokens are written in the alphabet of a kind of decoder or pre-tokenizer."""
    steps = [*_parts(description.get("decoder"), "decoders")]
    steps += _parts(description.get("pre_tokenizer"), "pretokenizers")
    return any(step.get("type") == kind for step in steps)


def _bytes_of(token: str, byte_level: bool) -> bytes:
    """What a token of a vocabulary stands for."""
    if byte_level:
        letters = _byte_letters()
        return b"".join(bytes([letters[letter]]) if letter in letters else letter.encode() for letter in token)
    if single := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token):
        return bytes([int(single[1], 16)])
    return token.replace(WORD_START, " ").encode(errors="surrogatepass")


@lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level vocabularies: itself if it can be seen, else one past 255."""
    seen = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    hidden = (value for value in range(256) if value not in seen)
    return {chr(value): value for value in seen} | {chr(256 + place): value for place, value in enumerate(hidden)}
