"""Memories of the right number, width and size: the model that reads with them makes them, and asks it of those given.

Shapes: B documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from memtrans.memory.given import snapshots_for
from memtrans.memory.knn_memory import KNNMemory
from memtrans.memory.memory_list import KNNMemoryList
from memtrans.memory.snapshot import MemorySnapshot


class MakesMemories:
    """The methods by which upstream's models make memories, and the one by which a model takes them up."""

    memorizing_layers: tuple[int, ...]
    num_memory_layers: int
    dim_head: int
    value_dim_head: int
    max_knn_memories: int
    kv_heads: int

    def create_knn_memories(self, *, batch_size: int, **kwargs: Any) -> KNNMemoryList:
        """Empty memories for a batch of documents; keyword arguments go to `KNNMemory` (device, dtype, spare, ...)."""
        create = KNNMemoryList.create_memories(batch_size=batch_size, num_memory_layers=self.num_memory_layers)
        sizes = {"dim": self.dim_head, "value_dim": self.value_dim_head, "kv_heads": self.kv_heads}
        return create(**{**sizes, "max_memories": self.max_knn_memories, **kwargs})

    @contextmanager
    def knn_memories_context(self, **kwargs: Any) -> Iterator[KNNMemoryList]:
        """Memories for a `with`, as upstream has it; they stay readable behind it, and go with the last reference."""
        yield self.create_knn_memories(**kwargs)

    def snapshots(
        self, memories: Sequence[KNNMemory | MemorySnapshot], batch: int, longest: int, device: torch.device
    ) -> list[MemorySnapshot]:
        """One snapshot per memory, taken before anything is added; raises where a memory is not this model's.

        Args:
            memories: one for each memorizing layer, of B = `batch` documents in scope.
            longest: the memories make room for segments of so many tokens.
            device: of the embeddings.

        Raises:
            ValueError, TypeError: another number of memories, no memory, or one of other sizes or another device.
        """
        return snapshots_for(
            memories,
            self.memorizing_layers,
            batch=batch,
            longest=longest,
            device=device,
            kv_heads=self.kv_heads,
            width=self.dim_head,
            value_width=self.value_dim_head,
        )
