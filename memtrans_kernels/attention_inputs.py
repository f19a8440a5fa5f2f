"""What operators of attention are given, by name; csrc/attention_inputs.h is the same of `memory_attention` in C++.

Shapes in the letters of `memtrans_kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AttentionInputs(NamedTuple):
    """The arguments of one call of `memory_attention` or its gradient, in the order of the operator's schema."""

    query: Tensor  # (B, H, N, D)
    key: Tensor  # (B, G, L, D)
    value: Tensor  # (B, G, L, E)
    memory_keys: Tensor  # (R, M + S, D)
    memory_values: Tensor  # (R, M + S, E)
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
    causal: bool = True
    key_mask: Tensor | None = None  # (B, L) bool
    first: Tensor | None = None  # (B, N) int64
    soft_cap: float | None = None
    sink: Tensor | None = None  # (H,)

    @property
    def device(self) -> torch.device:
        """Where the operator runs."""
        return self.query.device

    @property
    def width(self) -> int:
        """D."""
        return self.query.shape[3]

    @property
    def value_width(self) -> int:
        """E."""
        return self.value.shape[3]

    @property
    def widest(self) -> int:
        """D or E."""
        return max(self.width, self.value_width)

    @property
    def neighbours(self) -> int:
        """K."""
        return self.slots.shape[3]

    @property
    def distances(self) -> int:
        """Columns of the bias by distance; without one it is as if there were one column of zeros."""
        return 1 if self.bias_table is None else self.bias_table.shape[1]


class WholeInputs(NamedTuple):
    """The arguments of one call of `whole_attention`, in the order of the operator's schema."""

    query: Tensor  # (B, H, N, D)
    keys: Tensor  # (R, M + S, D)
    values: Tensor  # (R, M + S, E)
    rows: Tensor  # (B·G,) int64
    start: Tensor  # (R,) int64
    cursor: Tensor  # (R,) int64
    capacity: int
    scale: Tensor  # (H,)
    local_out: Tensor | None = None  # (B, H, N, E)
    local_lse: Tensor | None = None  # (B, H, N)
    memory_offset: Tensor | None = None  # (H,)

    @property
    def device(self) -> torch.device:
        """Where the operator runs."""
        return self.query.device

    @property
    def widest(self) -> int:
        """D or E."""
        return max(self.keys.shape[2], self.values.shape[2])


def strides_by_position(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Of (B, H, N, E) numbers that lie as (B, N, H, E): a layer's next product reads them without a copy.

    >>> strides_by_position((2, 3, 5, 7))
    (105, 7, 21, 1)
    """
    _, heads, length, width = shape
    return length * heads * width, width, heads * width, 1


NUMBERS = tuple(name for name in AttentionInputs._fields if name in ("dropout_p", "causal", "soft_cap"))  # no tensors
