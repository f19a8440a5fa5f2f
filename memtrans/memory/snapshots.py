"""Snapshots of the memories that a layer or a model is given, which must fit what it reads.

Shapes: B documents, G key/value heads, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from memtrans.memory.checks import check_no_recomputation
from memtrans.memory.knn_memory import KNNMemory
from memtrans.memory.ring import MemorySnapshot


def snapshot_for(
    name: str,
    memory: KNNMemory | MemorySnapshot,
    *,
    batch: int,
    longest: int,
    device: torch.device,
    kv_heads: int,
    width: int,
) -> MemorySnapshot:
    """The snapshot given, or one of the memory given, for segments of at most `longest` tokens on that device.

    Raises:
        TypeError: `memory` is something else.
        ValueError: it is not of B = `batch` documents in scope, G = `kv_heads` and D = `width`.
        RuntimeError: it is a memory, and activation checkpointing runs a forward pass again.
    """
    if isinstance(memory, KNNMemory):
        check_no_recomputation(name, memory.made_in)
        memory = memory.as_it_stands(device, longest)
    elif not isinstance(memory, MemorySnapshot):
        raise TypeError(f"{name} must be a KNNMemory or a snapshot of one, got {type(memory).__name__}")
    memory.check_fits(name, batch, kv_heads, width)
    return memory


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
