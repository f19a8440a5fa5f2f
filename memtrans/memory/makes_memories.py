"""Memories of the right number, width and size, from the model that reads with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from memtrans.memory.memory_list import KNNMemoryList


class MakesMemories:
    """The methods by which upstream's models make memories."""

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
