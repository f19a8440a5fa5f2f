"""Attention that reads a memory beside the local context.

Shapes: B documents, H query heads, G key/value heads, N tokens of the segment, X cached XL tokens, L = X + N local
keys, D head width, K retrieved neighbours. Source: Wu et al. 2022, section 3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from memtrans.attention import LocalContext, LocalView, bias_arguments
from memtrans.checks import check_bias, check_count, check_number
from memtrans.memory.knn_memory import KNNMemory, snapshot_for
from memtrans.memory.merge import merged
from memtrans.memory.ring import MemorySnapshot
from memtrans.memory.sharded import ShardedSnapshot
from memtrans_kernels import checks, cosine, local_attention, memory_attention

COMBINATIONS = ("softmax", "gate")


class KNNAttention(LocalContext):
    """Attention to the local context and to the K nearest entries of a memory.

    Cosine similarity with a learned temperature per head; the memory is never differentiated. Both parts share one
    softmax; or each has its own, and g = sigmoid(memory_gate), learned per head, mixes what they give:
    g · retrieved + (1 - g) · local. A query that finds nothing takes the local part whole.

    Args:
        dim: model width. heads: H. dim_head: D. dropout: of the attention weights. num_retrieved_memories: K.
        xl_max_memories: X; only what leaves the XL cache is added to the memory.
        attn_scale_init: the temperature's start. gate_output: multiply the result by tanh of a gate that starts at 0.
        kv_heads: G. memory_offset: start of a learned offset per head on the retrieved logits; None for none.
        combine: "softmax" for the joint one, "gate" for the mixture, which starts at equal parts.

    Raises:
        ValueError: an argument out of range; `memory_offset` beside a gate, where it would change nothing.

    Source: Wu et al. 2022, section 3.1: the gate; the joint softmax is that of the paper's first version.

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
        combine: str = "softmax",
    ) -> None:
        super().__init__(dim, heads, dim_head, dropout, xl_max_memories, kv_heads, bias_out=False)
        self.num_retrieved_memories = checks.integer("num_retrieved_memories", num_retrieved_memories, low=1)
        check_number("attn_scale_init", attn_scale_init, above=0)
        if combine not in COMBINATIONS:
            raise ValueError(f"combine must be one of {', '.join(COMBINATIONS)}, got {combine!r}")
        if combine == "gate" and memory_offset is not None:
            raise ValueError(f"memory_offset must be None with combine='gate', got {memory_offset}")
        self.scale = nn.Parameter(torch.full((self.heads, 1, 1), math.log(attn_scale_init)))
        self.output_gate = nn.Parameter(torch.zeros(1)) if gate_output else None
        self.memory_offset = None
        if memory_offset is not None:
            check_number("memory_offset", memory_offset)
            self.memory_offset = nn.Parameter(torch.full((self.heads,), float(memory_offset)))
        self.memory_gate = nn.Parameter(torch.zeros(self.heads)) if combine == "gate" else None

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
        temperature: Tensor | None = None,
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
            lengths: (B,) int64, how many of the N tokens are real; padding at the tail is neither cached nor stored.
                Default: all.
            add_to: the memory to add to. Default: `knn_memory`.
            return_memory: also return the state of the memory after the segment.
            temperature: what `temperature()` gives, from callers that read token by token. Default: computed here.

        Returns:
            out (B, N, dim), and the new XL cache, None without one; `Attention.forward` says what it holds of rows with
            padding.

        Raises:
            ValueError, TypeError: a shape, dtype, device or memory that does not fit; on the CPU also a count out of
            range. Nothing was added then.
        """
        query, key, value = self.project(x)
        query, key = cosine(query, key)
        key, value = self.extend(key, value, xl_memory)
        check_count("local_length", local_length, x, key.shape[2])
        check_count("lengths", lengths, x, x.shape[1])
        check_bias(rel_pos_bias, query, key.shape[2])
        longest = max(x.shape[1], key.shape[2] - self.xl_max_memories)  # more than N only for a foreign, longer cache
        snapshot = snapshot_for("knn_memory", knn_memory, key, longest, self.kv_heads, self.dim_head)
        target = snapshot
        if add_to is not None:
            target = snapshot_for("add_to", add_to, key, longest, self.kv_heads, self.dim_head)
        local = {"key": key, "value": value, "local_length": local_length}
        local |= bias_arguments(rel_pos_bias, self.heads, query.shape[2], key.shape[2])
        if temperature is None:
            temperature = self.temperature()
        checks.Letters(H=self.heads).bind("temperature", temperature, "H")
        out = self._attend(query, snapshot, local, temperature)
        if add_knn_memory:
            target = self.add_leaving(target, key, value, x.shape[1], local_length, lengths)
        out = self.merge(out)
        if self.output_gate is not None:
            out = out * self.output_gate.tanh()
        result = out, self.cache(key, value, xl_memory, x.shape[1], lengths)
        return (*result, target) if return_memory else result

    def temperature(self) -> Tensor:
        """What logits are multiplied by, per head (H,): the exponential of what is learned."""
        return self.scale.exp().flatten()

    def _attend(self, query: Tensor, snapshot: MemorySnapshot, local: dict[str, Any], temperature: Tensor) -> Tensor:
        """Looks at the neighbours of each query and at the local keys; (B, H, N, D)."""
        if isinstance(snapshot, ShardedSnapshot):
            return self._attend_over_ranks(query, snapshot, local, temperature)
        scores, slots = snapshot.nearest(query, self.num_retrieved_memories)
        shared: dict[str, Any] = {
            "query": query,
            "memory_keys": snapshot.keys,
            "memory_values": snapshot.values,
            "rows": snapshot.rows,
            "scale": temperature,
        }
        retrieved: dict[str, Any] = {
            "scores": scores,
            "slots": slots,
            "memory_offset": self.memory_offset,
            "ledger": snapshot.ledger,
        }
        if self.memory_gate is None:
            return memory_attention(**shared, **retrieved, **local, **self.dropout_arguments(query))[0]
        no_keys = local["key"][:, :, :0].detach()
        retrieved |= {"key": no_keys, "value": no_keys}
        local |= {"scores": scores[..., :0], "slots": slots[..., :0]}
        to_memory, to_local = (
            memory_attention(**shared, **part, **self.dropout_arguments(query))[0] for part in (retrieved, local)
        )
        return self._mixed(to_memory, to_local, slots[..., 0] >= 0)  # the best come first

    def _mixed(self, to_memory: Tensor, to_local: Tensor, found: Tensor) -> Tensor:
        """Both by the gate; a query that found (B, H, N) nothing takes the local part whole."""
        assert self.memory_gate is not None
        gate = torch.where(found[..., None], self.memory_gate.sigmoid()[:, None, None], 0.0)
        return (gate * to_memory + (1.0 - gate) * to_local).to(to_local.dtype)

    def _attend_over_ranks(
        self, query: Tensor, snapshot: ShardedSnapshot, local: dict[str, Any], temperature: Tensor
    ) -> Tensor:
        """The same where the neighbours are on several ranks: a softmax in two parts, merged."""
        to_memory, memory_lse, found = snapshot.attend(
            query, self.num_retrieved_memories, temperature, **self.dropout_arguments(query)
        )
        to_local, local_lse = local_attention(query=query, scale=temperature, **local, **self.dropout_arguments(query))
        if self.memory_gate is not None:
            return self._mixed(to_memory, to_local, found)
        if self.memory_offset is not None:
            memory_lse = memory_lse + self.memory_offset[:, None]
        memory_lse = memory_lse.masked_fill(~found, -torch.inf)
        return merged(torch.stack((to_memory, to_local)), torch.stack((memory_lse, local_lse)))[0]

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
    """Which of the `leaving` oldest local keys leave, [first, last) per document: not those of another document.

    For each token of padding one more stays, because none of the padding is cached; last may lie before first.
    """
    given = local_length if local_length is not None else lengths
    assert given is not None
    first = torch.zeros_like(given) if local_length is None else (local_keys - local_length).clamp(0, leaving)
    last = torch.full_like(given, leaving) if lengths is None else leaving - (length - lengths)
    return first, last
