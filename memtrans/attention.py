"""Attention to the local context, and what it shares with attention that also reads a memory (`knn_attention.py`).

Shapes: B documents, H query heads, G key/value heads, N tokens of the segment, X cached XL tokens, L = X + N local
keys, D head width. Source: Wu et al. 2022, section 3; the XL cache is Dai et al. 2019 (Transformer-XL).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from memtrans.checks import check_bias, check_cache, check_count, check_hidden, sizes, whole_number
from memtrans_kernels import checks, local_attention


class LocalView:
    """What attention is given instead of an XL cache: it keeps the new keys and values and returns all to attend to."""

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key, value (B, G, N, D) of the new tokens -> local keys and values (B, G, L, D)."""
        raise NotImplementedError


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


class Attention(LocalContext):
    """Causal multi-query attention over the segment and its XL cache.

    Args:
        dim: model width. heads: H. dim_head: D. dropout: of the attention weights. xl_max_memories: X, cached tokens.
        kv_heads: G.

    >>> attention = Attention(dim=32, heads=4, dim_head=8, xl_max_memories=16)
    >>> out, xl_memory = attention(torch.randn(2, 10, 32))
    >>> out.shape, xl_memory.shape
    (torch.Size([2, 10, 32]), torch.Size([2, 10, 2, 8]))
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        xl_max_memories: int = 0,
        kv_heads: int = 1,
    ) -> None:
        super().__init__(dim, heads, dim_head, dropout, xl_max_memories, kv_heads, bias_out=True)
        self.scale = dim_head**-0.5

    def forward(
        self,
        x: Tensor,
        *,
        xl_memory: Tensor | LocalView | None = None,
        rel_pos_bias: Tensor | None = None,
        local_length: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends.

        Args:
            x: (B, N, dim).
            xl_memory: (B, X, 2, D), or (B, G, X, 2, D) if G > 1, or the view of a `LocalCache`, which keeps the keys
                and values itself.
            rel_pos_bias: by distance (H, distances), or dense (1 or B, H, at least N, at least L).
            local_length: (B,) int64, how many of the newest of the L local keys are this document's. Default: all.
            lengths: (B,) int64, how many of the N tokens are real; padding at the tail is not cached. Default: all.

        Returns:
            out (B, N, dim), and the new XL cache, None without one. Each row's cache ends with its newest real token;
            of a row that said less than the cache holds, only so many are its document's: `local_length` of the next
            segment, of N tokens, is N plus that number.

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; on the CPU also a count out of range.
        """
        query, key, value = self.project(x)
        key, value = self.extend(key, value, xl_memory)
        check_count("local_length", local_length, x, key.shape[2])
        check_count("lengths", lengths, x, x.shape[1])
        check_bias(rel_pos_bias, query, key.shape[2])
        cached = self.cache(key, value, xl_memory, x.shape[1], lengths)
        bias = bias_arguments(rel_pos_bias, self.heads, query.shape[2], key.shape[2])
        if x.shape[1] == 1 and local_length is None and "bias_dense" in bias and not self.training:
            return self.merge(self._attend_once(query, key, value, **bias)), cached
        out, _ = local_attention(
            query,
            key,
            value,
            torch.full((self.heads,), self.scale, device=x.device),
            **bias,
            local_length=local_length,
            **self.dropout_arguments(query),
        )
        return self.merge(out), cached

    def _attend_once(self, query: Tensor, key: Tensor, value: Tensor, bias_dense: Tensor) -> Tensor:
        """One query a head, (B, H, 1, D), by PyTorch's attention: heads that share keys are queries of one head."""
        batch, heads, _, width = query.shape
        of_group = (self.kv_heads, heads // self.kv_heads)
        mask = bias_dense[:, :, 0].unflatten(1, of_group).to(query.dtype)
        out = F.scaled_dot_product_attention(query.reshape(batch, *of_group, width), key, value, mask, scale=self.scale)
        return out.reshape(batch, heads, 1, width)


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


def __getattr__(name: str) -> Any:
    """`KNNAttention` stood here; pickles of that time look for it here."""
    if name == "KNNAttention":
        return import_module("memtrans.knn_attention").KNNAttention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
