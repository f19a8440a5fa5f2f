"""What a layer is given of its local context, and what its queries attend to there.

Shapes: B documents, H query heads, G key/value heads, N tokens of the segment, X cached XL tokens, L = X + N local
keys, D head width, E width of values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memtrans.segments import Beginnings, Padding


class LocalView:
    """What attention is given instead of an XL cache: it keeps the new keys and values and returns all to attend to.

    Each token finds itself among them.
    """

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key (B, G, N, D), value (B, G, N, E) of the new tokens -> local keys (B, G, L, D), values (B, G, L, E)."""
        raise NotImplementedError


class LayerInputs(NamedTuple):
    """What the attention of one layer is given beside its input; whoever makes one has checked what it holds.

    Attributes:
        xl_memory: (B, X, 2, D), or (B, G, X, 2, D) if G > 1, or the view of a `LocalCache`.
        rel_pos_bias: by distance (H, distances), or dense (1 or B, H, at least N, at least L).
        local_length: (B,) int64, how many of the newest of the L local keys are this document's. Default: all.
        lengths: (B,) int64, how many of the N tokens are real. Default: all.
        temperature: (H,), of a memorizing layer. Default: the layer computes it.
        padding: of the N tokens, which leads and takes no position. Default: none.
        beginnings: of documents inside the segment. Default: none begins in it.
        query_mask: (B, N) bool, False for tokens that see no neighbour. Default: all see theirs.
    """

    xl_memory: Tensor | LocalView | None = None
    rel_pos_bias: Tensor | None = None
    local_length: Tensor | None = None
    lengths: Tensor | None = None
    temperature: Tensor | None = None
    padding: Padding | None = None
    beginnings: Beginnings | None = None
    query_mask: Tensor | None = None

    def first(self, length: int, local_keys: int) -> Tensor | None:
        """The oldest local key that each of N = `length` queries sees, (B, N); None where all see the oldest."""
        first = None
        if self.beginnings is not None:
            age = self.beginnings.age
            own = torch.arange(local_keys - length, local_keys, device=age.device)
            first = torch.where(age < 0, 0, own + 1 - age)
        if self.padding is not None:
            first = torch.where(self.padding.real, 0 if first is None else first, local_keys)
        return first

    def staying(self, local_length: Tensor | None, local_keys: int) -> Tensor | None:
        """How many of the newest of L = `local_keys` are of the document that goes on behind the segment (B,).

        local_length: (B,), how many of them count. None for all, as what is returned.
        """
        if self.beginnings is None:
            return local_length
        left = self.beginnings.left
        return torch.where(left < 0, local_keys if local_length is None else local_length, left)

    def sees_neighbours(self) -> Tensor | None:
        """Which queries see neighbours, (B, N) bool; None where all do.

        A memory holds nothing of a document that begins in the segment.
        """
        sees = self.query_mask
        if self.beginnings is not None:
            older = self.beginnings.age < 0
            sees = older if sees is None else sees & older
        if self.padding is not None:
            sees = self.padding.real if sees is None else sees & self.padding.real
        return sees


def not_inputs(given: object) -> str:
    """What an error says of a mask or a cache that stands where a model's loop gives all of them together."""
    return f"inputs must be LayerInputs, got {type(given).__name__}: give mask, xl_memory and the rest by name"


class LocalKeys(NamedTuple):
    """The local context that queries attend to, as the kernels take it.

    Attributes:
        key: (B, G, L, D).
        value: (B, G, L, E).
        bias_table: (H, distances), a bias by distance.
        bias_dense: (1 or B, H, N, L), a bias of each pair.
        local_length: (B,) int64, how many of the newest keys count. Default: all.
        first: (B, N) int64, the oldest key that each query sees. Default: the oldest of all.
        causal: whether a query sees no key behind it.
        soft_cap: what bounds a logit before its bias, the retrieved ones too. Default: none.
        sink: (H,), a logit in the denominator alone. Default: none.
        query_mask: (B, N) bool, False for queries that see no neighbour. Default: all see theirs.
        padding: how the queries were put in this order, for whoever wants them as they were given. Default: they were.
    """

    key: Tensor
    value: Tensor
    bias_table: Tensor | None
    bias_dense: Tensor | None
    local_length: Tensor | None
    first: Tensor | None = None
    causal: bool = True
    soft_cap: float | None = None
    sink: Tensor | None = None
    query_mask: Tensor | None = None
    padding: Padding | None = None


def seed_of(dropout_p: float, device: torch.device) -> Tensor | None:
    """A seed () int64 for the kernel's dropout, drawn on the device; None where nothing is dropped."""
    return None if dropout_p == 0.0 else torch.randint(2**62, (), device=device)


def biases(
    rel_pos_bias: Tensor | None, heads: int, length: int, local_keys: int
) -> tuple[Tensor | None, Tensor | None]:
    """A bias as the kernels take it: by distance (H, distances), or dense (1 or B, H, N, L); None for the other."""
    if rel_pos_bias is None:
        return None, None
    if rel_pos_bias.dim() == 2:
        return rel_pos_bias, None
    dense = rel_pos_bias if rel_pos_bias.dim() == 4 else rel_pos_bias[None]
    if dense.shape[1:] == (heads, length, local_keys):
        return None, dense
    return None, dense[..., -length:, -local_keys:].expand(-1, heads, -1, -1)
