"""Says how many bytes memories will take before they take them, once, where that is much."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

MUCH = 1 << 30  # bytes: 1 GiB

log = logging.getLogger("memtrans.memory")


class Announcement:
    """What is said of memories that are made together, by the first of them that is allocated.

    Args:
        memories: how many there are, of one size.
    """

    def __init__(self, memories: int = 1) -> None:
        self.memories, self.made = memories, False

    def say(self, bytes_of_one: int, shape: tuple[int, ...]) -> None:
        """Logs the bytes of all memories as a warning where they are more than MUCH, the first time it is called.

        shape: of one, as `KNNMemory` has it.
        """
        if self.made:
            return
        self.made = True
        size = self.memories * bytes_of_one
        if size > MUCH:
            log.warning(
                "%d memories of shape %s take %s bytes (%.1f GiB); a smaller max_memories, batch or dtype takes less",
                self.memories, shape, f"{size:,}", size / MUCH,
            )  # fmt: skip


_TOGETHER: ContextVar[Announcement | None] = ContextVar("together", default=None)


@contextmanager
def made_together(memories: int) -> Iterator[None]:
    """Memories that are made inside a `with` are announced as so many together."""
    token = _TOGETHER.set(Announcement(memories))
    try:
        yield
    finally:
        _TOGETHER.reset(token)


def announcement() -> Announcement:
    """What a memory that is made now says before it is allocated."""
    return _TOGETHER.get() or Announcement()
