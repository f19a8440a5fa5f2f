"""Upstream's module of this name, for its import lines: `from memtrans.knn_memory import KNNMemoryList, KNNMemory`."""

from memtrans.memory import KNNMemory, KNNMemoryList

# Where upstream keeps its files. memtrans keeps none, and ignores `knn_memories_directory` and its like.
DEFAULT_KNN_MEMORY_MEMMAP_DIRECTORY = "./.tmp/knn.memories"

__all__ = ["DEFAULT_KNN_MEMORY_MEMMAP_DIRECTORY", "KNNMemory", "KNNMemoryList"]
