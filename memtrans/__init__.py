"""The Memorizing Transformer as building blocks: a drop-in replacement of `memorizing-transformers-pytorch`."""

from memtrans.attention import Attention
from memtrans.compatibility import find_former_modules
from memtrans.generation.generate import generate
from memtrans.knn_attention import KNNAttention
from memtrans.memory import KNNMemory, KNNMemoryList, join_shards
from memtrans.position import T5RelativePositionBias
from memtrans.transformer import MemorizingTransformer

__version__ = "0.1.0"

find_former_modules()

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
