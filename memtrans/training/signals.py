"""How a run hears that it is to stop, and ends at a place where nothing is left half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class StoppedError(KeyboardInterrupt):
    """A signal ended the run.

    Args:
        number: of the signal.
        failed: what went wrong in the step that the signal came in, if something did.

    Attributes:
        status: of the process, as shells give it: 130 for Ctrl-C, 143 for SIGTERM.
        failed: as given.

    >>> print(StoppedError(signal.SIGTERM))
    stopped by SIGTERM
    >>> print(StoppedError(signal.SIGINT, RuntimeError("C++ compile error")))
    stopped by Ctrl-C in a step that failed (RuntimeError: C++ compile error)
    """

    def __init__(self, number: int = signal.SIGINT, failed: Exception | None = None) -> None:
        words = f"stopped by {SIGNALS[number]}"
        if failed is not None:
            first = next(iter(str(failed).splitlines()), "")
            words += f" in a step that failed ({type(failed).__name__}: {first})"
        super().__init__(words)
        self.status, self.failed = 128 + number, failed


class Interruption:
    """Inside a `with`, a signal to stop is noted, so that nothing is left half done; Ctrl-C after one stops at once.

    It hears Ctrl-C, and SIGTERM, which schedulers, containers and `torchrun` send, some of them twice. Does nothing
    outside of the main thread, where signals cannot be heard.

    Args:
        agreed: asked for which signal's number to believe in, 0 for none, whenever this process is; several processes
            then stop at the same place, and for the same reason.

    Attributes:
        noted: the number of the signal that this process heard, 0 before.
    """

    def __init__(self, agreed: Callable[[int], int] = int) -> None:
        self._agreed, self.noted = agreed, 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: one of C, which cannot be put back

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.noted and number == signal.SIGINT:
            raise StoppedError(number)
        self.noted = self.noted or number

    def heard(self) -> int:
        """The number of the signal to stop that there was, 0 without one."""
        return self._agreed(self.noted)

    def check(self) -> None:
        """Raises StoppedError if there was a signal to stop."""
        number = self.heard()
        if number:
            raise StoppedError(number)
