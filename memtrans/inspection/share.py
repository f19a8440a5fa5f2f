"""How much of the layers' attention goes to the memory, and how full the memory is; for training's reports.

Shapes: B rows, N tokens of a segment, H query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from memtrans.layers import evaluating
from memtrans.memory.memory_list import KNNMemoryList
from memtrans.memory.observation import Observation
from memtrans.transformer import MemorizingTransformer


@contextmanager
def watched_shares(memories: KNNMemoryList) -> Iterator[list[Tensor]]:
    """A list that gets, of each call of attention in the `with`, the weight of what it retrieved, (B, H, N) in [0, 1].

    These are sums of the weights that a trace notes, which are before dropout. A trace would keep them all on the host.
    """
    found: list[Tensor] = []

    def note(observation: Observation) -> None:
        found.append(observation.weights.sum(dim=-1))

    with ExitStack() as stack:
        for memory in memories:
            stack.enter_context(memory.watch.by(note, wants_local=False))
        yield found


@torch.no_grad()
def measured_share(
    model: MemorizingTransformer, memories: KNNMemoryList, read: Callable[[], object], counted: Tensor
) -> float | None:
    """The mean share over heads, memory layers and the tokens that are counted; None where none is.

    Args:
        model: of which `read` reads a segment with `memories`, without dropout, and leaves everything as it is.
        counted: (B, N) bool.
    """
    if not model.memorizing_layers or not bool(counted.any()):
        return None
    with evaluating(model), watched_shares(memories) as found:
        read()
    mean = torch.stack([share.mean(dim=1)[counted].mean() for share in found]).mean()
    return float(mean)


def memory_fill(memories: KNNMemoryList) -> float | None:
    """How much of the memories is filled, from 0 to 1; None without one."""
    if not memories:
        return None
    shares = [memory.lengths.double().mean() / memory.max_memories for memory in memories]
    return float(torch.stack(shares).mean())
