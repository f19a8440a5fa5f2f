"""How a command ends other than well, and what it prints."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from memtrans.training.progress import printable


class EndedError(Exception):
    """A command cannot go on; the message is for the user.

    Attributes:
        status: of the process. everywhere: of several ranks each says it that meets it, not the first one alone.
    """

    def __init__(self, message: str, status: int = 1, everywhere: bool = False) -> None:
        super().__init__(message)
        self.status, self.everywhere = status, everywhere


@contextmanager
def reading_input(*also: type[Exception]) -> Iterator[None]:
    """Turns what is wrong with something that the user gave into an EndedError of status 2."""
    kinds: tuple[type[Exception], ...] = (ValueError, OSError, *also)
    try:
        yield
    except kinds as error:
        raise EndedError(str(error), 2) from error


@contextmanager
def writing() -> Iterator[None]:
    """Turns what a full disk raises into an EndedError; a reader that has gone is no error of the command."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise EndedError(f"writing failed: {error}") from error


def show(text: str, end: str = "\n") -> None:
    """Prints to standard output, at once, as `printable` has it."""
    with writing():
        print(printable(text), end=end, flush=True)


def show_json(values: Mapping[str, Any]) -> None:
    """Prints an object as one line of strict JSON: what is no finite number is null."""
    finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
    show(json.dumps(finite, allow_nan=False))
