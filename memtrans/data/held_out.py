"""Which texts of a source are held out, by their names, sizes and hashes alone; and what is left to learn from.

Shapes: T texts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from memtrans.data.texts import STANDARD_LIBRARY, Source

ENWIK8_SPLIT = (90_000_000, 5_000_000, 5_000_000)
HELD_OUT_SHARE = 0.05  # of the bytes of several documents
HELD_OUT_END = 0.1  # of a single document
TRAIN, VALIDATION, TEST = "train", "validation", "test"
DRAWN, NAMED, ENWIK8 = "drawn", "named", "enwik8"  # the ways in which documents are held out
# Words in the names of splits that a corpus has itself; the first of these kinds that a name has a word of is its own.
OF_TRAINING = {"train", "training"}
OF_TESTS = {"test", "tests", "testing", "devtest"}
OF_VALIDATION = {"validation", "validate", "valid", "val", "dev", "development", "eval", "evaluation"}
HELD = ("heldout", "holdout")  # written in one word or two
WORD = re.compile("[A-Z]?[a-z]+|[A-Z]+")
LEAST = 2  # bytes of a text: a token and what comes after it


def way_of(source: Source) -> str:
    """How documents of a source are held out: drawn by the hash of their names, or as the source or everybody does."""
    if source.has_splits():
        return NAMED
    is_enwik8 = source.path.name.split(".")[0] == "enwik8" and not source.path.is_dir()
    return ENWIK8 if is_enwik8 and source.data != STANDARD_LIBRARY else DRAWN


def enwik8_ends() -> tuple[int, ...]:
    """Where the parts of enwik8 end, to learn from, for validation and for tests."""
    return tuple(accumulate(ENWIK8_SPLIT))


def cuts_of(way: str) -> tuple[int, ...]:
    """Places of bytes that no token may reach over."""
    return enwik8_ends()[:-1] if way == ENWIK8 else ()


def named(names: Sequence[str]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which texts are for validation and which for tests (T,), by the splits that their names begin with.

    >>> [mask.tolist() for mask in named(["train/0", "dev/0", "test/0"])]
    [[False, True, False], [False, False, True]]
    """
    splits, split = np.unique([name.split("/", 1)[0] for name in names], return_inverse=True)
    kinds = np.array([_kind(str(name)) for name in splits], dtype=str)
    return (kinds == VALIDATION)[split], (kinds == TEST)[split]


def _kind(split: str) -> str:
    """What a split is for, by its name.

    >>> [_kind(name) for name in ("train", "VAL", "test.clean", "HeldOut", "val2017", "unsupervised")]
    ['train', 'validation', 'test', 'validation', 'validation', 'train']
    """
    words = [word.lower() for word in WORD.findall(split)]
    if not OF_TRAINING.isdisjoint(words):
        return TRAIN
    if not OF_TESTS.isdisjoint(words):
        return TEST
    held = any(word in "".join(words) for word in HELD)
    return VALIDATION if held or not OF_VALIDATION.isdisjoint(words) else TRAIN


def drawn(
    name: Callable[[int], str], sizes: NDArray[np.int64], digests: NDArray[np.uint8], indices: NDArray[np.int64]
) -> NDArray[np.bool_] | None:
    """Which of the texts `indices` are held out, drawn by the hash of their names, copies together; None of one text.

    name, sizes, digests: of all texts, (T,) and (T, 32).
    """
    groups, group = np.unique(np.ascontiguousarray(digests[indices, :8]).view(np.uint64)[:, 0], return_inverse=True)
    if len(groups) == 1:
        return None
    draws = np.array([_draw(name(int(index))) for index in indices], dtype=np.uint64)
    first = np.full(len(groups), 2**64 - 1, dtype=np.uint64)
    np.minimum.at(first, group, draws)
    of_group = np.zeros(len(groups), dtype=np.int64)
    np.add.at(of_group, group, sizes[indices])
    share, size = int(of_group.sum() * HELD_OUT_SHARE), 0
    chosen = []
    for candidate in np.argsort(first, kind="stable").tolist():
        if size >= share:
            break
        if size + of_group[candidate] <= 2 * share:
            chosen.append(candidate)
            size += int(of_group[candidate])
    return np.isin(group, chosen or [int(of_group.argmin())])


def _draw(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8], "big")


def before_end(size: int) -> int:
    """How many bytes a single text of so many has before its end, which is held out."""
    return size - max(2, int(size * HELD_OUT_END))


# ----------------------------------------------------------------------------------------------- what is left to learn


def pieces_to_learn(source: Source) -> Iterator[bytes]:
    """The bytes that a run over the source learns from, for whatever else is learned before it.

    The texts are read twice: what is held out shows once all of them were seen. Of a single text, the token that lies
    across the border is held out; up to there its bytes are among these.
    """
    names, sizes, digests = [], [], []
    for name, pieces in source.texts():
        size, digest = 0, hashlib.sha256()
        for piece in pieces:
            size += len(piece)
            digest.update(piece)
        names.append(name)
        sizes.append(size)
        digests.append(digest.digest())
    left = _left_to_learn(way_of(source), names, np.array(sizes, dtype=np.int64), digests)
    for text, most in zip(source.texts(), left, strict=False):
        for piece in text.pieces:  # all of them: the next text may lie behind
            if most > 0:
                yield piece[:most]
            most -= len(piece)


def _left_to_learn(way: str, names: Sequence[str], sizes: NDArray[np.int64], digests: Sequence[bytes]) -> list[int]:
    """How many bytes of each text, from its beginning, are not held out."""
    left, counted, draws = np.zeros_like(sizes), sizes >= LEAST, True
    if way == ENWIK8:
        return [ENWIK8_SPLIT[0]] * len(names)
    if way == NAMED:
        validation, test = named(names)
        draws = not bool((counted & validation).any())
        counted &= ~(validation | test)
    chosen = np.flatnonzero(counted)
    if draws and len(chosen):
        of_all = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32)
        held_out = drawn(names.__getitem__, sizes, of_all, chosen)
        if held_out is None:
            left[chosen[0]] = before_end(int(sizes[chosen[0]]))
            return left.tolist()
        chosen = chosen[~held_out]
    left[chosen] = sizes[chosen]
    return left.tolist()
