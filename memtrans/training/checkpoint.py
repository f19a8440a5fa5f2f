"""Checkpoints: safetensors for tensors, JSON for everything else, nothing that executes when read.

A checkpoint is a directory. Its `checkpoint.json`, the index, names the tensor files that belong to the checkpoint and
their SHA-256. `save_checkpoint` writes tensor files under new names and forces them to disk, then renames a new index
over the old one, then removes the files that the new index does not name. The renaming replaces the old checkpoint by
the new one at once, so a kill or a full disk at any moment leaves one of them whole. Whoever reads meanwhile may miss a
file that was just removed; there is a new index then, and `load_checkpoint` begins again with it.

Where several ranks share a run they share the directory too. Each rank writes its own tensors to files of its own
(`part_name`); the first rank writes the index when all files are on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from memtrans.distributed.ranks import ALONE, Ranks
from memtrans.files import MOST_JSON, parse_json, parse_tensors, read_file
from memtrans.storage import write_atomically

INDEX = "checkpoint.json"
KIND = "memtrans.checkpoint"
VERSION = 1

# The names of a part, of one that is being written, and of an index that is.
WRITTEN = re.compile(rf"[^.].*-[0-9a-f]{{16}}\.safetensors|\..+-[0-9a-f]{{16}}\.safetensors\..+|\.{INDEX}\..+")

Parts = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint.

    Attributes:
        parts: named tensors by part (`model`, `optimizer`, ...). values: what JSON can hold.
    """

    parts: Parts
    values: dict[str, Any]


def exists(directory: str | Path) -> bool:
    """Whether the directory holds a checkpoint."""
    return (Path(directory) / INDEX).is_file()


def part_name(part: str, rank: int) -> str:
    """The name under which a rank writes its rows of a part, such as `memories`, of which every rank holds some rows.

    >>> part_name("memories", 0), part_name("memories", 3)
    ('memories', 'memories.3')
    """
    return part if rank == 0 else f"{part}.{rank}"


def save_checkpoint(directory: str | Path, parts: Parts, values: Mapping[str, Any], ranks: Ranks = ALONE) -> None:
    """Writes a checkpoint in the place of the one that is there, if any.

    Args:
        directory: where to write; it is made if it is missing.
        parts: tensors by part and name. Each part becomes a file. Two ranks must not give parts of one name.
        values: anything that JSON can hold. Those of the first rank are written.
        ranks: the processes that write together.

    Raises:
        OSError: a rank could not write, because the disk is full, say. The previous checkpoint is whole.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save_checkpoint(directory, {"model": {"weight": torch.ones(2)}}, {"step": 7})
    ...     checkpoint = load_checkpoint(directory)
    >>> checkpoint.values, checkpoint.parts["model"]["weight"].tolist()
    ({'step': 7}, [1.0, 1.0])
    """
    directory = Path(directory)
    try:
        own = ranks.together(lambda: _write_parts(directory, parts))
        files = {part: file for of_rank in ranks.gather(own) for part, file in of_rank.items()}
        ranks.together(lambda: _write_index(directory, files, values) if ranks.first else None)
    except BaseException:
        if ranks.first:
            with suppress(OSError, ValueError):  # what failed is told, not that its remains cannot be removed
                _remove_unnamed(directory)
        raise
    if ranks.first:
        _remove_unnamed(directory)


def _write_parts(directory: Path, parts: Parts) -> dict[str, dict[str, str]]:
    """Writes each part to a new file; returns the name and the SHA-256 of the file of each part."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {}
    for part, tensors in parts.items():
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        digest = hashlib.sha256(content).hexdigest()
        files[part] = {"name": f"{part}-{digest[:16]}.safetensors", "sha256": digest}
        write_atomically(directory / files[part]["name"], content)
    _force_to_disk(directory)
    return files


def _write_index(directory: Path, files: Mapping[str, Mapping[str, str]], values: Mapping[str, Any]) -> None:
    """Replaces the index, and with it the checkpoint."""
    index = {"kind": KIND, "version": VERSION, "files": files, "values": dict(values)}
    index["sha256"] = _digest(index)
    write_atomically(directory / INDEX, (json.dumps(index, indent=1) + "\n").encode())
    _force_to_disk(directory)


def require(checkpoint: Checkpoint, *values: str) -> Checkpoint:
    """Returns the checkpoint. Raises ValueError when it lacks one of the values named."""
    missing = [name for name in values if name not in checkpoint.values]
    if missing:
        raise ValueError(f"checkpoint must be a training run's, got one without {', '.join(missing)}")
    return checkpoint


def load_checkpoint(
    directory: str | Path, wanted: Callable[[str, Mapping[str, Any]], bool] = lambda part, values: True
) -> Checkpoint:
    """Reads and verifies a checkpoint, of a run that goes on the newest one.

    wanted: a function of a part's name and the checkpoint's values that says whether to read the part. Default: all.

    Raises:
        FileNotFoundError: there is none. ValueError: it is damaged, or something else.

    >>> load_checkpoint("no/such/run")
    Traceback (most recent call last):
        ...
    FileNotFoundError: checkpoint must be a directory with checkpoint.json, got 'no/such/run'
    """
    directory = Path(directory)
    if not exists(directory):
        raise FileNotFoundError(f"checkpoint must be a directory with {INDEX}, got {str(directory)!r}")
    index = _read_index(directory / INDEX)
    while True:
        values, files = index["values"], index["files"].items()
        try:
            parts = {part: _read_part(directory, part, file) for part, file in files if wanted(part, values)}
            return Checkpoint(parts, values)
        except (ValueError, OSError):
            read, index = index, _read_index(directory / INDEX)
            if index == read:  # nobody wrote another checkpoint
                raise


def _read_part(directory: Path, part: str, file: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a part. Raises ValueError where its file is missing or damaged."""
    path = directory / file["name"]
    try:
        content = read_file(f"part {part} of the checkpoint", path)
    except FileNotFoundError:
        content = b""
    if hashlib.sha256(content).hexdigest() != file["sha256"]:
        what = "does not have the bytes that were written" if content else "is missing"
        raise ValueError(f"checkpoint must be whole, got {str(directory)!r}, where {file['name']} {what}")
    try:
        return parse_tensors(content)
    except SafetensorError as error:
        raise ValueError(f"checkpoint must hold safetensors files, got {str(path)!r}: {error}") from error


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = parse_json(read_file(INDEX, path, MOST_JSON))
    except ValueError as error:
        raise ValueError(f"checkpoint must have a whole {INDEX}, got {str(path)!r}: {error}") from error
    if not isinstance(index, dict) or index.get("kind") != KIND:
        raise ValueError(f"checkpoint must be one of memtrans, got {str(path)!r} of another kind")
    if index.get("version") != VERSION:
        raise ValueError(f"checkpoint must be of version {VERSION}, got {index.get('version')} in {str(path)!r}")
    if index.pop("sha256", None) != _digest(index):
        raise ValueError(f"checkpoint must be whole, got {str(path)!r}, which was changed since it was written")
    files, values = index.get("files"), index.get("values")
    if not isinstance(values, dict) or not isinstance(files, dict) or not all(map(_is_file, files.values())):
        raise ValueError(f"checkpoint must name its files and values, got {str(path)!r} without")
    return index


def _is_file(file: Any) -> bool:
    """Whether an index's entry names a file in its own directory."""
    if not isinstance(file, dict) or not isinstance(file.get("name"), str) or not isinstance(file.get("sha256"), str):
        return False
    return Path(file["name"]).name == file["name"] and file["name"].endswith(".safetensors")


def _digest(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _force_to_disk(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_unnamed(directory: Path) -> None:
    """Removes the files of earlier and of interrupted checkpoints, which their names tell from those of others."""
    if not exists(directory):
        named = set()
    else:
        named = {INDEX, *(file["name"] for file in _read_index(directory / INDEX)["files"].values())}
    for path in directory.iterdir():
        if WRITTEN.fullmatch(path.name) and path.name not in named:
            path.unlink(missing_ok=True)
