"""Files that somebody else may have written: what never ends, never begins or nests without end is refused by name."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

MOST_JSON = 64 << 20  # bytes; the largest that is written here has a few thousand
# What PyTorch raises for a safetensors file that is whole, but of dtypes or sizes that it does not have.
NO_TENSORS = (KeyError, ValueError, TypeError, RuntimeError, OverflowError)


def expanded(path: str) -> Path:
    """The path with the user's directory in place of `~`; as it is where there is no such user.

    >>> print(expanded("~no-such-user/text"))
    ~no-such-user/text
    """
    return Path(os.path.expanduser(path))


def _opened(name: str, path: str | Path, pipes: bool) -> BinaryIO:
    """An open file, without waiting for whoever might write to a pipe.

    Raises ValueError for what is neither a regular file nor, where `pipes` is true, a pipe; OSError as `open` does.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode) or (pipes and stat.S_ISFIFO(mode)):
        return os.fdopen(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    kind = "pipe" if stat.S_ISFIFO(mode) else "device"
    raise ValueError(f"{name} must be a regular file{' or a pipe' if pipes else ''}, got {str(path)!r}, a {kind}")


def check_file(name: str, path: str | Path) -> None:
    """Raises ValueError unless the path is a regular file's; OSError as `open` does."""
    _opened(name, path, pipes=False).close()


def read_file(name: str, path: str | Path, most: int | None = None) -> bytes:
    """The bytes of a regular file.

    name: of the argument, for errors. most: so many bytes at most.

    Raises ValueError for a pipe, a device or a longer file; OSError as `open` does.

    >>> read_file("config", "/dev/zero")
    Traceback (most recent call last):
    ValueError: config must be a regular file, got '/dev/zero', a device
    """
    with _opened(name, path, pipes=False) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise ValueError(f"{name} must have at most {most} bytes, got {size} in {str(path)!r}")
        return file.read()


def read_input(name: str, path: str | Path) -> bytes:
    """The bytes of a regular file, or of a pipe that somebody writes to, as a shell's `<(...)` is.

    Raises ValueError for a device, or a pipe to which nobody writes; OSError as `open` does.
    """
    with _opened(name, path, pipes=True) as file:
        if not stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
            return file.read()
        beginning = _what_is_there(file.fileno())
        if beginning == b"":
            raise ValueError(f"{name} must be a pipe that somebody writes to, got {str(path)!r}, to which nobody does")
        os.set_blocking(file.fileno(), True)
        return (beginning or b"") + file.read()


def open_input(name: str, path: str | Path) -> BinaryIO:
    """A regular file open for reading, or, as one of its bytes, a pipe that somebody writes to. Raises as `read_input`.

    >>> open_input("data", "/dev/zero")
    Traceback (most recent call last):
    ValueError: data must be a regular file or a pipe, got '/dev/zero', a device
    """
    file = _opened(name, path, pipes=True)
    if not stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    return io.BytesIO(read_input(name, path))


def _what_is_there(handle: int) -> bytes | None:
    """What a pipe holds; empty where nobody writes to it, None where somebody has still to write."""
    try:
        return os.read(handle, 1 << 16)
    except BlockingIOError:
        return None


def parse_json(content: str | bytes) -> Any:
    """The value that JSON says. Raises ValueError for what is no JSON, or nests too deeply."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error


def parse_tensors(content: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises SafetensorError for whatever is none that PyTorch can hold."""
    try:
        return load(content)
    except NO_TENSORS as error:
        raise SafetensorError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
