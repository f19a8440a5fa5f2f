"""Locks that processes hold on files; the operating system releases them when a process ends, however it ends."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"  # of a directory


class Lock:
    """Makes a directory this process's own until `release`, or until the process ends.

    directory: made if missing. user, does: who writes to it and what it does there, for errors.

    Raises ValueError when another process has locked it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     lock = Lock(directory)
    ...     lock.release()
    """

    def __init__(self, directory: str | Path, user: str = "run", does: str = "trains") -> None:
        self.directory, self._user, self._does = Path(directory), user, does
        self.directory.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self.directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._take()
        except BaseException:
            self.release()
            raise

    def _take(self) -> None:
        try:
            if fcntl is None:
                raise OSError("this system has no flock")
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(self._handle, 20).decode(errors="replace").strip()
            raise ValueError(
                f"out must be a directory that no other {self._user} writes to, got {str(self.directory)!r}, where "
                f"process {holder or 'unknown'} {self._does}"
            ) from error
        except OSError as error:
            warnings.warn(
                f"{self.directory} cannot be locked ({error}): a second {self._user} in it would not be refused",
                stacklevel=4,
            )
        os.ftruncate(self._handle, 0)
        os.write(self._handle, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Lets other processes lock the directory."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Holds a lock that one process at a time has; others wait for it.

    path: of a file, made if missing.
    """
    with path.open("a") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
