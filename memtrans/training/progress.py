"""How a run tells where it stands: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any


def printable(text: str) -> str:
    """A text as standard output can take it: what its encoding has no sign for is said by number."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


class Progress:
    """A bar on standard error where that is a terminal and tqdm is installed, lines on standard output otherwise.

    Args:
        steps: of the run. done: steps behind it. plain: lines in any case. shown: False says nothing at all.
    """

    def __init__(self, steps: int, done: int, plain: bool, shown: bool = True) -> None:
        self._bar = None
        self._steps, self._shown = steps, shown
        if shown and not plain and sys.stderr.isatty():
            with suppress(ImportError):  # lines tell the same
                from tqdm import tqdm

                self._bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True)

    def step(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update(1)

    def report(self, line: Mapping[str, Any]) -> None:
        """Shows bits per byte and tokens per second of the last steps, and the share of the peak where it is known."""
        text = f"{line['bits_per_byte']:.3f} bits per byte, {line['tokens_per_second']:,.0f} tokens/s"
        if "peak_share" in line:
            text += f", {line['peak_share']:.1%} of peak FLOP/s"
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        else:
            self.say(f"step {line['step']}/{self._steps}: {text}")

    def say(self, text: str) -> None:
        """Shows a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(printable(text), file=sys.stdout)
        elif self._shown:
            print(printable(text), flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
