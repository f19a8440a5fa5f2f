"""Snapshots of the memories that a layer or a model is given, which must fit what it reads.

Shapes: B documents, G key/value heads, D width of keys, E of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from memtrans.memory.checks import check_no_recomputation
from memtrans.memory.knn_memory import KNNMemory
from memtrans.memory.snapshot import MemorySnapshot

PASSED_BY = ("search", "add", "clear_rows", "snapshot")  # what layers do through snapshots


def snapshot_for(
    name: str,
    memory: KNNMemory | MemorySnapshot,
    *,
    batch: int,
    longest: int,
    device: torch.device,
    kv_heads: int,
    width: int,
    value_width: int | None = None,
) -> MemorySnapshot:
    """The snapshot given, or one of the memory given, for segments of at most `longest` tokens on that device.

    Raises:
        TypeError: `memory` is something else, or has a method of its own that no layer would call.
        ValueError: it is not of B = `batch` documents in scope, G = `kv_heads`, D = `width` and E =
            `value_width`, by default D.
        RuntimeError: it is a memory, and activation checkpointing runs a forward pass again.
    """
    if isinstance(memory, KNNMemory):
        check_methods(name, memory)
        check_no_recomputation(name, memory.made_in)
        memory = memory.as_it_stands(device, longest)
    elif not isinstance(memory, MemorySnapshot):
        raise TypeError(f"{name} must be a KNNMemory or a snapshot of one, got {_named(type(memory))}")
    memory.check_fits(name, batch, kv_heads, width, width if value_width is None else value_width)
    return memory


def check_methods(name: str, memory: KNNMemory) -> None:
    """Raises TypeError for a memory whose subclass or user replaced a method that layers go past."""
    kind = type(memory)
    own = [method for method in PASSED_BY if getattr(kind, method) is not getattr(KNNMemory, method)]
    if not torch.compiler.is_compiling():
        own += [method for method in PASSED_BY if method in memory.__dict__]
    if own:
        raise TypeError(
            f"{name} must have the methods of KNNMemory, because layers read and write its snapshots, got a "
            f"{_named(kind)} with {', '.join(own)} of its own"
        )


def _named(kind: type) -> str:
    """A class with its module: another package has a `KNNMemory` too."""
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def snapshots_for(
    memories: Sequence[KNNMemory | MemorySnapshot], layers: tuple[int, ...], **fitting: Any
) -> list[MemorySnapshot]:
    """One snapshot per memory of a model, of its memorizing layers, taken before anything is added.

    fitting: what every memory must fit; see `snapshot_for`.

    Raises ValueError where there are more or fewer memories than layers, and what `snapshot_for` raises.
    """
    if not isinstance(memories, Sequence):
        raise TypeError(f"knn_memories must be a sequence of memories, got {type(memories).__name__}")
    if len(memories) != len(layers):
        raise ValueError(f"knn_memories must hold one memory for each of the layers {layers}, got {len(memories)}")
    return [snapshot_for(f"knn_memories[{place}]", memory, **fitting) for place, memory in enumerate(memories)]
