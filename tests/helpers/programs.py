"""`python -m memtrans`, and scripts, in processes that are forked from one that has imported memtrans already.

For tests of what a run does, says and leaves behind. How a process starts and ends, tests see in one of its own.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import TimeoutExpired

import torch
from helpers.processes import launched, warm_context


class Program:
    """A running command line, with what a test asks of a `subprocess.Popen`.

    arguments: after `python -m memtrans`, or after the script. variables: of its environment, beside those that are
    here. script: what runs in place of memtrans.
    """

    def __init__(self, *arguments: str, variables: Mapping[str, str] | None = None, script: Path | None = None) -> None:
        self.arguments = arguments
        out, err = os.pipe(), os.pipe()
        self.stdout, self.stderr = (os.fdopen(pipe[0], encoding="utf-8") for pipe in (out, err))
        ends = [Connection(pipe[1], readable=False) for pipe in (out, err)]
        environment = {**os.environ, **(variables or {})}
        self._process = warm_context().Process(target=_run, args=(script, arguments, environment, *ends), daemon=True)
        self._process.start()
        for end in ends:
            end.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it still writes to standard output and to standard error until its end."""
        with ThreadPoolExecutor(2) as pool:
            texts = [pool.submit(stream.read) for stream in (self.stdout, self.stderr)]
            self._process.join(timeout)
            if self._process.exitcode is None:
                self.kill()  # or the threads would read for ever
                raise TimeoutExpired(self.arguments, timeout or 0.0)
            out, err = (text.result() for text in texts)
        self.stdout.close()
        self.stderr.close()
        return out, err

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def forked(size: int, *arguments: str) -> list[Program]:
    """The command line on each rank, with the variables that torchrun sets."""
    return [Program(*arguments, variables=variables) for variables in launched(size)]


def _run(
    script: Path | None, arguments: tuple[str, ...], environment: dict[str, str], out: Connection, err: Connection
) -> None:
    """As the interpreter begins: with the environment, the two streams and the signals that a new process has."""
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    out.close()
    err.close()
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    sys.argv = ["memtrans" if script is None else str(script), *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if script is None:
        from memtrans.__main__ import main

        sys.exit(main())
    runpy.run_path(str(script), run_name="__main__")
