"""The text of each token, so that together they are the whole text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise


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


def texts_of_tokens(content: bytes, sizes: Sequence[int]) -> list[str]:
    """A text for each token, of the bytes of all of them and how many are each one's: a character is its first byte's.

    >>> texts_of_tokens("né!".encode(), [2, 1, 1])
    ['né', '', '!']
    """
    texts, ends = texts_of_bytes(content), list(accumulate(sizes, initial=0))
    return ["".join(texts[begin:end]) for begin, end in pairwise(ends)]


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
