"""The memory of a document: rings of keys and values, on one device or over several ranks."""

from memtrans.memory.knn_memory import KNNMemory
from memtrans.memory.memory_list import KNNMemoryList
from memtrans.memory.state import join_shards

__all__ = ["KNNMemory", "KNNMemoryList", "join_shards"]
