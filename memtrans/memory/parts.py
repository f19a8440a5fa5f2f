"""The two parts of a memorizing layer's attention: the local one by itself, and both put together.

Shapes: the letters of `memtrans_kernels`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from memtrans.local_keys import LocalKeys, seed_of
from memtrans_kernels import local_attention


class Asking(NamedTuple):
    """What a memory is asked with where that is not what asks the local keys.

    Attributes:
        query: (B, H, N, D). scale: (H,), what its logits are multiplied by.
    """

    query: Tensor
    scale: Tensor


class Weighing(NamedTuple):
    """How a layer weighs what it attends to.

    Attributes:
        scale: (H,), what logits are multiplied by.
        memory_offset, memory_gate, dropout_p, asking: as of `MemorySnapshot.attend`.
    """

    scale: Tensor
    memory_offset: Tensor | None = None
    memory_gate: Tensor | None = None
    dropout_p: float = 0.0
    asking: Asking | None = None


def attend_to_local(query: Tensor, local: LocalKeys, scale: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Attention of query (B, H, N, D) to the local keys alone: out (B, H, N, E) and lse (B, H, N)."""
    return local_attention(
        query, local.key, local.value, scale, local.bias_table, local.bias_dense, local.local_length,
        dropout_p, seed_of(dropout_p, query.device),
        causal=local.causal, first=local.first, soft_cap=local.soft_cap, sink=local.sink,
    )  # fmt: skip


def mixed(to_memory: Tensor, to_local: Tensor, share: Tensor) -> Tensor:
    """share · to_memory + (1 - share) · to_local, of (B, H, N, E), (B, H, N, E) and (B, H, N), in one kernel."""
    return to_local.lerp(to_memory, share.to(to_local.dtype)[..., None])
