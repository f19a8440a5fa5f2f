"""`python -m memtrans`."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from typing import Any


def main() -> int:
    """Runs the command line. Ctrl-C while everything is still being imported ends it quietly too.

    A crash in native code says where it was.
    """
    if sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)
    previous = signal.getsignal(signal.SIGINT)
    if previous is signal.default_int_handler:  # not where Ctrl-C is ignored, as in the background
        # an exception would not do: what an interrupted import raises in its place is anything
        signal.signal(signal.SIGINT, _leave)
    from memtrans.cli.main import main as run

    return run(imported=lambda: signal.signal(signal.SIGINT, previous))


def _leave(*_: Any) -> None:
    os._exit(128 + signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
