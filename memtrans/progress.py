"""How a run tells where it stands: a bar on a terminal, plain lines elsewhere; and how it hears that it is to stop."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

SIGNALS: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Progress:
    """A bar on standard error where that is a terminal, lines on standard output otherwise.

    Args:
        steps: of the run. done: steps behind it. plain: lines in any case. shown: False says nothing at all.
    """

    def __init__(self, steps: int, done: int, plain: bool, shown: bool = True) -> None:
        self._bar = None
        self._steps, self._shown = steps, shown
        if shown and not plain and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True)

    def step(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update(1)

    def report(self, line: Mapping[str, Any]) -> None:
        """Shows bits per byte and tokens per second of the last steps."""
        bits, speed = f"{line['bits_per_byte']:.3f}", f"{line['tokens_per_second']:,.0f}"
        if self._bar is not None:
            self._bar.set_postfix_str(f"{bits} bits per byte, {speed} tokens/s")
        else:
            self.say(f"step {line['step']}/{self._steps}: {bits} bits per byte, {speed} tokens/s")

    def say(self, text: str) -> None:
        """Shows a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        elif self._shown:
            print(text, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def reading_bar(tokens: int, shown: bool) -> Any:
    """A bar for reading so many tokens, on standard error where that is a terminal; a context manager."""
    from tqdm import tqdm

    return tqdm(total=tokens, unit="token", desc="reading", dynamic_ncols=True, disable=None if shown else True)


class StoppedError(KeyboardInterrupt):
    """A signal ended the run.

    Attributes:
        status: of the process, as shells give it: 130 for Ctrl-C, 143 for SIGTERM.

    >>> print(StoppedError(signal.SIGTERM))
    stopped by SIGTERM
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(f"stopped by {SIGNALS[number]}")
        self.status = 128 + number


class Interruption:
    """Inside a `with`, a signal to stop is noted, so that nothing is left half done; Ctrl-C after one stops at once.

    It hears Ctrl-C, and SIGTERM, which schedulers, containers and `torchrun` send, some of them twice. Does nothing
    outside of the main thread, where signals cannot be heard.

    Args:
        agreed: asked for which signal's number to believe in, 0 for none, whenever this process is; several processes
            then stop at the same place, and for the same reason.
    """

    def __init__(self, agreed: Callable[[int], int] = int) -> None:
        self._agreed, self._noted = agreed, 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: one of C, which cannot be put back

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._noted and number == signal.SIGINT:
            raise StoppedError(number)
        self._noted = self._noted or number

    def heard(self) -> int:
        """The number of the signal to stop that there was, 0 without one."""
        return self._agreed(self._noted)

    def check(self) -> None:
        """Raises StoppedError if there was a signal to stop."""
        number = self.heard()
        if number:
            raise StoppedError(number)
