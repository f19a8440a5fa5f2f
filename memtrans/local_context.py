"""The local context of attention: its heads, its keys and values with those of the XL cache, its bias.

Shapes: B documents, H query heads, G key/value heads, N tokens of the segment, X cached XL tokens, L = X + N local
keys, D head width. Source: Wu et al. 2022, section 3; the XL cache is Dai et al. 2019 (Transformer-XL).
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from memtrans.local_cache import LocalView
from memtrans.validation import check_cache, check_hidden, sizes, whole_number
from memtrans_kernels import checks


class LocalContext(nn.Module):
    """What both kinds of attention share: projections to heads, the XL cache, the way out.

    Subclasses say what to do with query (B, H, N, D) and the local keys and values (B, G, L, D).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        dropout: float,
        xl_max_memories: int,
        kv_heads: int,
        bias_out: bool,
    ) -> None:
        super().__init__()
        dim, heads, dim_head, kv_heads = sizes(1, dim=dim, heads=heads, dim_head=dim_head, kv_heads=kv_heads)
        checks.divides(kv_heads, "kv_heads", heads, "heads")
        checks.probability("dropout", dropout)
        self.heads, self.kv_heads, self.dim_head = heads, kv_heads, dim_head
        self.xl_max_memories = whole_number("xl_max_memories", xl_max_memories, low=0)
        self.dropout = nn.Dropout(dropout)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, kv_heads * dim_head * 2, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=bias_out)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, H, N, D), key and value (B, G, N, D) of x (B, N, dim)."""
        check_hidden("x", x, self.to_q.weight)
        query = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads)
        key, value = rearrange(self.to_kv(x), "b n (kv g d) -> kv b g n d", kv=2, g=self.kv_heads)
        return query, key, value

    def extend(self, key: Tensor, value: Tensor, xl_memory: Tensor | LocalView | None) -> tuple[Tensor, Tensor]:
        """Puts the cached keys and values before the segment's own: (B, G, L, D)."""
        if xl_memory is None:
            return key, value
        if isinstance(xl_memory, LocalView):
            return xl_memory.extend(key, value)
        check_cache("xl_memory", xl_memory, key.shape[0], self.kv_heads, self.dim_head, key.device)
        cached = xl_memory if self.kv_heads > 1 else xl_memory[:, None]
        cached_key, cached_value = cached.to(key.dtype).unbind(dim=-2)
        return torch.cat((cached_key, key), dim=-2), torch.cat((cached_value, value), dim=-2)

    def cache(
        self,
        key: Tensor,
        value: Tensor,
        xl_memory: Tensor | LocalView | None,
        length: int,
        lengths: Tensor | None,
    ) -> Tensor | None:
        """The newest of the local keys and values, for the next segment: (B, X, 2, D), or (B, G, X, 2, D) if G > 1.

        length: N. lengths: (B,) int64, real tokens among them: each row's cache ends with its newest real token, so
        that distances in the next segment are those of a text without padding.
        """
        if self.xl_max_memories == 0 or isinstance(xl_memory, LocalView):
            return None
        padding = None if lengths is None else length - lengths
        newest = (newest_of(tensor.detach(), self.xl_max_memories, padding) for tensor in (key, value))
        cached = torch.stack(tuple(newest), dim=-2)
        return cached if self.kv_heads > 1 else cached[:, 0]

    def dropout_arguments(self, query: Tensor) -> dict[str, Any]:
        """Of the kernel: nothing unless weights are dropped; the seed is drawn on the device."""
        if not self.training or self.dropout.p == 0.0:
            return {}
        return {"dropout_p": self.dropout.p, "seed": torch.randint(2**62, (), device=query.device)}

    def merge(self, out: Tensor) -> Tensor:
        """Heads (B, H, N, D) back to (B, N, dim)."""
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


def newest_of(local: Tensor, most: int, padding: Tensor | None) -> Tensor:
    """Of local keys or values (B, G, L, D) the newest, at most so many: (B, G, min(most, L), D).

    padding: (B,) int64, how many of the last ones do not count; zeros lead where fewer are left.
    """
    local_keys = local.shape[2]
    first = max(0, local_keys - most)
    if padding is None:
        return local[:, :, first:]
    place = torch.arange(first, local_keys, device=local.device) - padding[:, None]
    place = place[:, None, :, None].expand(-1, local.shape[1], -1, local.shape[3])
    return local.gather(2, place.clamp(min=0)).masked_fill(place < 0, 0.0)


def bias_arguments(rel_pos_bias: Tensor | None, heads: int, length: int, local_keys: int) -> dict[str, Any]:
    """By distance (H, distances), or dense: (..., N, L) with up to two leading axes that broadcast against (1, H)."""
    if rel_pos_bias is None:
        return {}
    if rel_pos_bias.dim() == 2:
        return {"bias_table": rel_pos_bias}
    dense = rel_pos_bias if rel_pos_bias.dim() == 4 else rel_pos_bias[None]
    return {"bias_dense": dense[..., -length:, -local_keys:].expand(-1, heads, -1, -1)}
