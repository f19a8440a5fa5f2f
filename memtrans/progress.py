"""How a run tells where it stands: a bar on a terminal, plain lines elsewhere; and how it hears Ctrl-C."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any


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


class Interruption:
    """Inside a `with`, the first Ctrl-C is only noted, so that nothing is left half done; the second one stops at once.

    Does nothing outside of the main thread, where signals cannot be heard.

    Args:
        agreed: asked for what to believe whenever this process is; several processes then stop at the same place.
    """

    def __init__(self, agreed: Callable[[bool], bool] = bool) -> None:
        self._agreed, self._noted = agreed, False
        self._restore: Callable[[], object] = lambda: None

    def __enter__(self) -> Interruption:
        try:
            previous = signal.signal(signal.SIGINT, self._hear)
        except ValueError:
            return self
        self._restore = lambda: signal.signal(signal.SIGINT, previous)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._noted:
            raise KeyboardInterrupt
        self._noted = True

    def heard(self) -> bool:
        """Whether there was a Ctrl-C."""
        return self._agreed(self._noted)

    def check(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C was heard."""
        if self.heard():
            raise KeyboardInterrupt
