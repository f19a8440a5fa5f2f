"""Upstream's module of this name, for its import lines: `from memtrans.memorizing_transformers_pytorch import ...`."""

import torch.nn.functional as F
from torch import Tensor

from memtrans.attention import Attention
from memtrans.knn_attention import KNNAttention
from memtrans.memory import KNNMemoryList
from memtrans.position import T5RelativePositionBias
from memtrans.residual import FeedForward, PreNormResidual
from memtrans.transformer import MemorizingTransformer

__all__ = [
    "Attention",
    "FeedForward",
    "KNNAttention",
    "KNNMemoryList",
    "MemorizingTransformer",
    "PreNormResidual",
    "T5RelativePositionBias",
    "l2norm",
]


def l2norm(t: Tensor) -> Tensor:
    """Makes the vectors of t (..., D) unit vectors.

    >>> import torch
    >>> l2norm(torch.tensor([3.0, 4.0])).tolist()
    [0.6000000238418579, 0.800000011920929]
    """
    return F.normalize(t, dim=-1)
