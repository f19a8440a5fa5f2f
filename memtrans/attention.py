"""Local attention with an XL cache, and attention that also reads a memory.

Shapes: B documents, H query heads, G key/value heads, N tokens of the segment, X cached XL tokens, L = X + N, D head
width. Source: Wu et al. 2022, section 3; the XL cache is Dai et al. 2019 (Transformer-XL).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from memtrans.local_cache import LocalView
from memtrans.memory import KNNMemory
from memtrans.position import expand_table
from memtrans.ring import MemorySnapshot
from memtrans.validation import at_least, check_cache, check_counts
from memtrans_kernels import cosine, memory_attention


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
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads={kv_heads}, got {heads}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.heads, self.kv_heads, self.dim_head = heads, kv_heads, dim_head
        self.xl_max_memories = int(xl_max_memories)
        self.dropout = nn.Dropout(dropout)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, kv_heads * dim_head * 2, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=bias_out)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, H, N, D), key and value (B, G, N, D) of x (B, N, dim)."""
        if x.dim() != 3 or x.shape[2] != self.to_q.in_features:
            raise ValueError(f"x must have shape (B, N, {self.to_q.in_features}), got {tuple(x.shape)}")
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

    def cache(self, key: Tensor, value: Tensor, xl_memory: Tensor | LocalView | None) -> Tensor | None:
        """The newest of the local keys and values, for the next segment: (B, X, 2, D), or (B, G, X, 2, D) if G > 1."""
        if self.xl_max_memories == 0 or isinstance(xl_memory, LocalView):
            return None
        newest = torch.stack((key, value), dim=-2)[:, :, -self.xl_max_memories :].detach()
        return newest if self.kv_heads > 1 else newest[:, 0]

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
    ) -> tuple[Tensor, Tensor | None]:
        """Attends.

        Args:
            x: (B, N, dim).
            xl_memory: (B, X, 2, D), or (B, G, X, 2, D) if G > 1, or the view of a `LocalCache`, which keeps the keys
                and values itself.
            rel_pos_bias: by distance (H, distances), or dense (1 or B, H, at least N, at least L).
            local_length: (B,) int64, how many of the newest of the L local keys are this document's. Default: all.

        Returns:
            out (B, N, dim), and the new XL cache, None without one.
        """
        check_counts(x, local_length=local_length)
        query, key, value = self.project(x)
        key, value = self.extend(key, value, xl_memory)
        out = self._attend(query, key, value, self._logit_mask(query, key, rel_pos_bias, local_length))
        return self.merge(out), self.cache(key, value, xl_memory)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """(B, H, N, D); mask is added to the logits."""
        batch, heads, length, width = query.shape
        dropout_p = self.dropout.p if self.training else 0.0
        if length > 1:
            return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=self.scale, enable_gqa=True)
        # The heads of a group are the queries of one key head: no key is repeated, and every kernel takes it.
        grouped = query.reshape(batch, self.kv_heads, -1, width)
        of_group = mask.expand(-1, heads, -1, -1).reshape(mask.shape[0], self.kv_heads, -1, mask.shape[3])
        out = F.scaled_dot_product_attention(grouped, key, value, of_group, dropout_p, scale=self.scale)
        return out.reshape(batch, heads, 1, width)

    def _logit_mask(
        self, query: Tensor, key: Tensor, rel_pos_bias: Tensor | None, local_length: Tensor | None
    ) -> Tensor:
        """What is added to the logits: the bias, and -inf where a query must not look; (1 or B, H or 1, N, L)."""
        length, local_keys = query.shape[2], key.shape[2]
        if rel_pos_bias is None:
            bias = query.new_zeros(1, 1, length, local_keys)
        elif rel_pos_bias.dim() == 2:
            bias = expand_table(rel_pos_bias, length, local_keys)[None]
        else:
            bias = rel_pos_bias[..., -length:, -local_keys:]
        bias = bias.to(query.dtype)
        if length == 1 and local_length is None:
            return bias
        column = torch.arange(local_keys, device=query.device)
        hidden = column > torch.arange(local_keys - length, local_keys, device=query.device)[:, None]
        if local_length is not None:
            hidden = hidden | (column < local_keys - local_length[:, None, None, None])
        return bias.masked_fill(hidden, -torch.inf)


class KNNAttention(LocalContext):
    """Attention to the local context and to the K nearest entries of a memory, in one softmax.

    Cosine similarity with a learned temperature per head; the memory is never differentiated.

    Args:
        dim: model width. heads: H. dim_head: D. dropout: of the joint attention weights. num_retrieved_memories: K.
        xl_max_memories: X; only what leaves the XL cache is added to the memory.
        attn_scale_init: the temperature's start. gate_output: multiply the result by tanh of a gate that starts at 0.
        kv_heads: G. memory_offset: start of a learned offset per head on the retrieved logits; None for none.

    >>> attention = KNNAttention(dim=32, heads=4, dim_head=8, num_retrieved_memories=3)
    >>> memory = KNNMemory(dim=8, max_memories=100, num_indices=2)
    >>> out, _ = attention(torch.randn(2, 10, 32), knn_memory=memory)
    >>> out.shape, memory.lengths.tolist()
    (torch.Size([2, 10, 32]), [10, 10])
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        num_retrieved_memories: int = 32,
        xl_max_memories: int = 0,
        attn_scale_init: float = 20,
        gate_output: bool = False,
        kv_heads: int = 1,
        memory_offset: float | None = None,
    ) -> None:
        super().__init__(dim, heads, dim_head, dropout, xl_max_memories, kv_heads, bias_out=False)
        at_least(1, num_retrieved_memories=num_retrieved_memories)
        if attn_scale_init <= 0:
            raise ValueError(f"attn_scale_init must be above 0, got {attn_scale_init}")
        self.num_retrieved_memories = num_retrieved_memories
        self.scale = nn.Parameter(torch.full((heads, 1, 1), math.log(attn_scale_init)))
        self.output_gate = nn.Parameter(torch.zeros(1)) if gate_output else None
        offset = None if memory_offset is None else torch.full((heads,), float(memory_offset))
        self.memory_offset = None if offset is None else nn.Parameter(offset)

    def forward(
        self,
        x: Tensor,
        *,
        knn_memory: KNNMemory | MemorySnapshot,
        xl_memory: Tensor | LocalView | None = None,
        add_knn_memory: bool = True,
        rel_pos_bias: Tensor | None = None,
        local_length: Tensor | None = None,
        lengths: Tensor | None = None,
        add_to: KNNMemory | MemorySnapshot | None = None,
        return_memory: bool = False,
    ) -> tuple[Any, ...]:
        """Searches, attends, then adds what leaves the XL cache (the whole segment where there is no cache).

        Args:
            x: (B, N, dim).
            xl_memory: (B, X, 2, D), or (B, G, X, 2, D) if G > 1, or the view of a `LocalCache`, which keeps the keys
                and values itself; then nothing is to be added here, and `add_leaving` adds at the segment's end.
            knn_memory: the memory to search, or a snapshot of it (use one under activation checkpointing).
            add_knn_memory: False leaves the memory as it is.
            rel_pos_bias: by distance (H, distances), or dense (1 or B, H, at least N, at least L).
            local_length: (B,) int64, how many of the newest of the L local keys are this document's. Default: all.
            lengths: (B,) int64, how many of the N tokens are real; padding at the tail is not stored. Default: all.
            add_to: the memory to add to. Default: `knn_memory`.
            return_memory: also return the state of the memory after the segment.

        Returns:
            out (B, N, dim), and the new XL cache, None without one.
        """
        check_counts(x, local_length=local_length, lengths=lengths)
        query, key, value = self.project(x)
        query, key = cosine(query, key)
        key, value = self.extend(key, value, xl_memory)
        longest = max(x.shape[1], key.shape[2] - self.xl_max_memories)  # more than N only for a foreign, longer cache
        snapshot = _snapshot_of(knn_memory, key, longest)
        if snapshot.documents != x.shape[0]:
            raise ValueError(f"knn_memory must have x's {x.shape[0]} documents in scope, got {snapshot.documents}")
        target = snapshot if add_to is None else _snapshot_of(add_to, key, longest)
        scores, slots = snapshot.nearest(query, self.num_retrieved_memories)
        out, _ = memory_attention(
            query,
            key,
            value,
            snapshot.keys,
            snapshot.values,
            snapshot.rows,
            scores,
            slots,
            self.scale.exp().flatten(),
            **_bias_arguments(rel_pos_bias, self.heads, query.shape[2], key.shape[2]),
            memory_offset=self.memory_offset,
            local_length=local_length,
            **self._dropout_arguments(query),
            ledger=snapshot.ledger,
        )
        if add_knn_memory:
            target = self.add_leaving(target, key, value, x.shape[1], local_length, lengths)
        out = self.merge(out)
        if self.output_gate is not None:
            out = out * self.output_gate.tanh()
        result = out, self.cache(key, value, xl_memory)
        return (*result, target) if return_memory else result

    def _dropout_arguments(self, query: Tensor) -> dict[str, Any]:
        if not self.training or self.dropout.p == 0.0:
            return {}
        return {"dropout_p": self.dropout.p, "seed": torch.randint(2**62, (), device=query.device)}

    def add_leaving(
        self,
        snapshot: MemorySnapshot,
        key: Tensor,
        value: Tensor,
        length: int,
        local_length: Tensor | None,
        lengths: Tensor | None,
    ) -> MemorySnapshot:
        """Adds the local keys and values (B, G, L, D) that the XL cache has no room for; returns the state after that.

        length: N, how many of the L are the segment's. local_length, lengths: as in `forward`.
        """
        local_keys = key.shape[2]
        leaving = max(0, local_keys - self.xl_max_memories)
        key, value = key[:, :, :leaving].detach(), value[:, :, :leaving].detach()
        if local_length is None and lengths is None:
            return snapshot.append(key, value)
        first, last = leaving_range(leaving, local_keys, length, local_length, lengths)
        index = (first[:, None] + torch.arange(leaving, device=key.device)).clamp(max=max(leaving - 1, 0))
        index = index[:, None, :, None].expand_as(key)
        return snapshot.append(key.gather(2, index), value.gather(2, index), (last - first).clamp(min=0))


def leaving_range(
    leaving: int, local_keys: int, length: int, local_length: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Which of the `leaving` oldest local keys are real, [first, last) per document: not foreign, not padding."""
    given = local_length if local_length is not None else lengths
    assert given is not None
    first = torch.zeros_like(given) if local_length is None else (local_keys - local_length).clamp(0, leaving)
    end = torch.full_like(given, local_keys) if lengths is None else local_keys - length + lengths
    return first, end.clamp(max=leaving)


def _snapshot_of(memory: KNNMemory | MemorySnapshot, key: Tensor, longest: int) -> MemorySnapshot:
    return memory if isinstance(memory, MemorySnapshot) else memory.snapshot(like=key, longest=longest)


def _bias_arguments(rel_pos_bias: Tensor | None, heads: int, length: int, local_keys: int) -> dict[str, Any]:
    """By distance (H, distances), or dense: (..., N, L) with up to two leading axes that broadcast against (1, H)."""
    if rel_pos_bias is None:
        return {}
    if rel_pos_bias.dim() == 2:
        return {"bias_table": rel_pos_bias}
    dense = rel_pos_bias if rel_pos_bias.dim() == 4 else rel_pos_bias[None]
    return {"bias_dense": dense[..., -length:, -local_keys:].expand(-1, heads, -1, -1)}
