"""The text of each token, so that together they are the whole text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from memtrans.data.tokens import Tokenizer


def texts_of_bytes(content: bytes) -> list[str]:
    r"""A text for each byte: its character, or nothing for the bytes behind a character's first.

    Bytes that are no character become U+FFFD each.

    >>> texts_of_bytes("né!".encode()), texts_of_bytes(b"a\xff\xe2\x82b")
    (['n', 'é', '', '!'], ['a', '\ufffd', '\ufffd', '\ufffd', 'b'])
    """
    texts: list[str] = []
    for character in content.decode("utf-8", "surrogateescape"):
        if "\udc80" <= character <= "\udcff":
            texts.append("\ufffd")
        else:
            texts += [character, *[""] * (len(character.encode()) - 1)]
    return texts


def texts_of_tokens(tokens: Any, tokenizer: Tokenizer) -> list[str]:
    """A text for each token (an array of ids): the characters that begin in its bytes.

    >>> from memtrans.data.tokens import BYTES
    >>> texts_of_tokens(BYTES.encode("né".encode()), BYTES)
    ['n', 'é', '']
    """
    of_bytes = texts_of_bytes(tokenizer.decode(tokens))
    ends = [0, *tokenizer.sizes[tokens].cumsum().tolist()]
    return ["".join(of_bytes[begin:end]) for begin, end in pairwise(ends)]


def texts_of_offsets(text: str, offsets: Sequence[tuple[int, int]]) -> list[str]:
    """A text for each token of a tokenizer, of where it begins and ends in the whole.

    What stands between two tokens goes to the one behind it, what several tokens share to the first.

    >>> texts_of_offsets("one  two!", [(0, 3), (5, 8), (8, 9), (8, 9)])
    ['one', '  two', '!', '']
    """
    texts, done = [], 0
    for _, end in offsets:
        texts.append(text[done : max(done, end)])
        done = max(done, end)
    if texts:
        texts[-1] += text[done:]
    return texts
