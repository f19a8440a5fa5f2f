"""Small memories whose values number what was added, and a look at all that they hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memtrans import KNNMemory


def pairs(*numbers: float, dim: int = 2, batch: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, N, 2, D): equal keys, so that a search returns them in order, and one number each as value."""
    values = torch.tensor(numbers, dtype=dtype)[:, None, None].expand(-1, 1, dim)
    return torch.cat((torch.ones_like(values), values), dim=1).expand(batch, -1, -1, -1)


def held(memory: KNNMemory, topk: int = 100) -> list[list[float]]:
    """The values that each document in scope holds, old to new."""
    key_values, mask = memory.search(torch.ones(len(memory.scoped_indices), 1, memory.dim), topk)
    return [kv[found][:, 1, 0].tolist() for kv, found in zip(key_values[:, 0], mask[:, 0], strict=True)]


def filled(batch: int = 2, **kwargs: Any) -> KNNMemory:
    memory = KNNMemory(**{"dim": 2, "max_memories": 4, "num_indices": batch, **kwargs})
    memory.add(pairs(1, 2, 3, batch=batch))
    return memory
