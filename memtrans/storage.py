"""Tensors with a configuration in one safetensors file, written so that a failure leaves the previous file whole."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from memtrans.files import NO_TENSORS, check_file, parse_json


def _umask() -> int:
    """The process's mask; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes beside `path`, forces the bytes to disk, then renames over it. Into a device or a pipe it just writes."""
    path = Path(path)
    if path.exists() and not path.is_file():  # nothing may take the place of /dev/null
        path.write_bytes(content)
        return
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's file is its owner's alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], kind: str, configuration: Mapping[str, Any]) -> None:
    """Saves tensors and a JSON configuration under the name of what they are; makes directories that are missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"kind": kind, "configuration": json.dumps(dict(configuration))}
    write_atomically(path, save(contiguous, metadata=metadata))


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `save_tensors` wrote under the same kind.

    Raises FileNotFoundError when there is no file, ValueError when it is damaged or of another kind.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"path must name a file written as {kind}, got {str(path)!r}, which does not exist")
    try:
        check_file("path", path)
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, *NO_TENSORS) as error:
        raise ValueError(f"path must name a whole safetensors file, got {str(path)!r}: {error}") from error
    if metadata.get("kind") != kind:
        raise ValueError(f"path must name a file written as {kind}, got {str(path)!r} of {metadata.get('kind')}")
    try:
        return tensors, dict(parse_json(metadata["configuration"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path must name a file with a JSON configuration, got {str(path)!r}: {error}") from error
