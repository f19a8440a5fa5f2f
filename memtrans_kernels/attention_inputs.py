"""What `memory_attention` and its gradients are given, by name; csrc/attention_inputs.h is the same in C++.

Shapes in the letters of `memtrans_kernels`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AttentionInputs(NamedTuple):
    """The arguments of one call, in the order of the operator's schema."""

    query: Tensor  # (B, H, N, D)
    key: Tensor  # (B, G, L, D)
    value: Tensor  # (B, G, L, D)
    memory_keys: Tensor  # (R, M + S, D)
    memory_values: Tensor  # (R, M + S, D)
    rows: Tensor  # (B·G,) int64
    scores: Tensor  # (B, H, N, K)
    slots: Tensor  # (B, H, N, K) int32
    scale: Tensor  # (H,)
    bias_table: Tensor | None = None  # (H, distances)
    bias_dense: Tensor | None = None  # (1 or B, H, N, L)
    memory_offset: Tensor | None = None  # (H,)
    local_length: Tensor | None = None  # (B,) int64
    dropout_p: float = 0.0
    seed: Tensor | None = None  # () int64

    @property
    def device(self) -> torch.device:
        """Where the operator runs."""
        return self.query.device

    @property
    def width(self) -> int:
        """D."""
        return self.query.shape[3]

    @property
    def neighbours(self) -> int:
        """K."""
        return self.slots.shape[3]

    @property
    def distances(self) -> int:
        """Columns of the bias by distance; without one it is as if there were one column of zeros."""
        return 1 if self.bias_table is None else self.bias_table.shape[1]
