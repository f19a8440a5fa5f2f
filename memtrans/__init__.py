"""The Memorizing Transformer as building blocks: a drop-in replacement of `memorizing-transformers-pytorch`."""

from memtrans.attention import Attention, KNNAttention
from memtrans.generate import generate
from memtrans.memory import KNNMemory
from memtrans.memory_list import KNNMemoryList
from memtrans.memory_state import join_shards
from memtrans.position import T5RelativePositionBias
from memtrans.transformer import MemorizingTransformer

__all__ = [
    "Attention",
    "KNNAttention",
    "KNNMemory",
    "KNNMemoryList",
    "MemorizingTransformer",
    "T5RelativePositionBias",
    "generate",
    "join_shards",
]
