"""Attention that reads a memory beside the local context.

Shapes: B documents, H query heads, G key/value heads, N tokens of the segment, X cached XL tokens, L = X + N local
keys, D head width, E width of values (D unless they have one of their own), K retrieved neighbours. Source: Wu et al.
2022, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memtrans.attention import COSINE_SCALE, SIMILARITIES, LocalContext, learned_temperature, temperature_of
from memtrans.checks import check_choice, check_number, check_tokens
from memtrans.local_keys import LayerInputs, not_inputs
from memtrans.memory.clearings import check_cache_known, cleared_since, remember
from memtrans.memory.given import snapshot_for
from memtrans.memory.knn_memory import KNNMemory
from memtrans.memory.leaving import add_leaving
from memtrans.memory.parts import Asking
from memtrans.memory.snapshot import MemorySnapshot
from memtrans.segments import ordered
from memtrans_kernels import checks, cosine

COMBINATIONS = ("softmax", "gate")
ATTENDED = ("neighbours", "all")
QUERIES = ("shared", "own")


class KNNAttention(LocalContext):
    """Attention to the local context and to the K nearest entries of a memory.

    Cosine similarity with a learned temperature per head, or products as plain layers have them; the memory is never
    differentiated. Both parts share one softmax; or each has its own, and g = sigmoid(memory_gate), learned per head,
    mixes what they give: g · retrieved + (1 - g) · local. A query that finds nothing takes the local part whole.

    Args:
        dim: model width.
        heads: H, query heads.
        dim_head: D, width of a head.
        dropout: probability of dropping an attention weight, in training.
        num_retrieved_memories: K, neighbours of each query.
        xl_max_memories: X, tokens that the XL cache keeps, 0 for none; only what leaves it is added to the memory.
        attn_scale_init: what the learned temperature (H,) starts at, or is. Default: 20, for products dim_head**-0.5.
        gate_output: whether the result is multiplied by tanh of a learned number that starts at 0.
        kv_heads: G, key/value heads; divides H.
        memory_offset: what a learned offset (H,) on the retrieved logits starts at; None for none.
        combine: "softmax" for the joint one, "gate" for the mixture by a learned gate (H,), which starts at a half.
        similarity: "cosine" of query and key, or their "product"; the memory then holds keys as they are.
        learn_scale: whether the temperature is learned.
        bias_out: whether the projection out has a bias.
        attend_to: "neighbours", the K nearest entries, or "all" entries that a search could find. Then nothing is
            searched and K changes nothing. It is meant for small memories: up to some thousand entries attention to
            all is cheaper than a search. The memory is of one process, and untraced.
        memory_query: what asks the memory, the "shared" query, as it asks the local keys, or one of its "own", for
            layers that learned without a memory. For head h that is query + query · memory_mix[h], and the
            temperature of what it finds is temperature[h] · exp(memory_sharpness[h]); memory_mix (H, D, D) and
            memory_sharpness (H,) start at 0 and change nothing yet. With cosines the query is normalised before that
            and not again.
        causal, soft_cap, sink, value_dim_head: as of `Attention`. The cap bounds retrieved logits too; the sink is in
            the joint softmax, with a gate in that of the local part; the memory has `value_dim=value_dim_head`.

    Raises:
        ValueError, TypeError: an argument out of range; `memory_offset` beside a gate, where it would change nothing.

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
        attn_scale_init: float | None = None,
        gate_output: bool = False,
        kv_heads: int = 1,
        memory_offset: float | None = None,
        combine: str = "softmax",
        similarity: str = "cosine",
        learn_scale: bool = True,
        bias_out: bool = False,
        causal: bool = True,
        soft_cap: float | None = None,
        sink: bool = False,
        value_dim_head: int | None = None,
        attend_to: str = "neighbours",
        memory_query: str = "shared",
    ) -> None:
        super().__init__(
            dim, heads, dim_head, dropout, xl_max_memories, kv_heads, bias_out,
            causal=causal, soft_cap=soft_cap, sink=sink, value_dim_head=value_dim_head,
        )  # fmt: skip
        self.num_retrieved_memories = checks.integer("num_retrieved_memories", num_retrieved_memories, low=1)
        check_choice("combine", combine, COMBINATIONS)
        check_choice("similarity", similarity, SIMILARITIES)
        check_choice("attend_to", attend_to, ATTENDED)
        check_choice("memory_query", memory_query, QUERIES)
        if attn_scale_init is None:
            attn_scale_init = COSINE_SCALE if similarity == "cosine" else self.dim_head**-0.5
        check_number("attn_scale_init", attn_scale_init, above=0)
        self.similarity, self.attend_to = similarity, attend_to
        if combine == "gate" and memory_offset is not None:
            raise ValueError(f"memory_offset must be None with combine='gate', got {memory_offset}")
        self.scale = learned_temperature(self.heads, attn_scale_init, learn_scale)
        self.output_gate = nn.Parameter(torch.zeros(1)) if gate_output else None
        self.memory_offset = None
        if memory_offset is not None:
            check_number("memory_offset", memory_offset)
            self.memory_offset = nn.Parameter(torch.full((self.heads,), float(memory_offset)))
        self.memory_gate = nn.Parameter(torch.zeros(self.heads)) if combine == "gate" else None
        self.memory_mix = self.memory_sharpness = None
        if memory_query == "own":
            self.memory_mix = nn.Parameter(torch.zeros(self.heads, self.dim_head, self.dim_head))
            self.memory_sharpness = nn.Parameter(torch.zeros(self.heads))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"similarity": "cosine", "attend_to": "neighbours", **state})
        for name in ("memory_mix", "memory_sharpness"):
            self._parameters.setdefault(name, None)

    def forward(
        self,
        x: Tensor,
        inputs: LayerInputs | None = None,
        *,
        knn_memory: KNNMemory | MemorySnapshot,
        xl_memory: Tensor | None = None,
        add_knn_memory: bool = True,
        rel_pos_bias: Tensor | None = None,
        local_length: Tensor | None = None,
        lengths: Tensor | None = None,
        add_to: KNNMemory | MemorySnapshot | None = None,
        return_memory: bool = False,
        temperature: Tensor | None = None,
        mask: Tensor | None = None,
        query_mask: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """Searches, attends, then adds what leaves the XL cache (the whole segment where there is no cache).

        Args:
            x: (B, N, dim).
            inputs: what has a field of that name there, checked already, with snapshots as memories: from a model's
                loop. Default: made of the arguments below, after a check.
            knn_memory: the memory to search, or a snapshot of it (use one under activation checkpointing).
            xl_memory: (B, X, 2, D), or (B, G, X, 2, D) if G > 1.
            add_knn_memory: False leaves the memory as it is.
            rel_pos_bias: by distance (H, distances), or dense (1 or B, H, at least N, at least L).
            local_length: (B,) int64, how many of the newest of the L local keys are this document's. Default: all.
            lengths: (B,) int64, how many of the N tokens are real; padding at the tail is neither seen, cached nor
                stored. Default: all.
            add_to: the memory to add to. Default: `knn_memory`.
            return_memory: also return the state of the memory after the segment.
            temperature: (H,), what `temperature()` gives, from callers that read by the token. Default: computed here.
            mask: (B, N) bool, False for padding anywhere: it is neither seen, cached nor stored, sees nothing and takes
                no position. Default: all is real.
            query_mask: (B, N) bool, False for tokens that see no neighbour. Default: all see theirs.

        Returns:
            out (B, N, dim), and the new XL cache, None without one; `Attention.forward` says what it holds of rows with
            padding. Of rows that a memory is told to forget from now on, nothing of it is seen or stored; a copy of it
            (clone, cast, rows picked) does not know that.

        Raises:
            ValueError, TypeError: a shape, dtype, device or memory that does not fit; on the CPU also a count out of
            range; without `local_length`, a copy of a cache beside a memory that was cleared since its last segment.
            Nothing was added then.
        """
        alone: tuple[MemorySnapshot, ...] = ()  # the memories of a layer that is called without a model
        if inputs is None:
            inputs = LayerInputs(xl_memory, rel_pos_bias, local_length, lengths, temperature, query_mask=query_mask)
            knn_memory, add_to = self.check_all(x, inputs, knn_memory, add_to)
            alone = (knn_memory,) if add_to is None else (knn_memory, add_to)
            inputs = _without_forgotten(inputs, x.shape[1], alone)
        elif not isinstance(inputs, LayerInputs):
            raise TypeError(not_inputs(inputs))
        assert isinstance(knn_memory, MemorySnapshot) and not isinstance(add_to, KNNMemory)
        added_to = knn_memory if add_to is None else add_to
        padding = None
        if mask is not None or (inputs.lengths is not None and not self.causal):
            x, inputs, padding = self.in_order(x, inputs, mask)
        query, key, value = self.project(x)  # (B, H, N, D), (B, G, N, D), (B, G, N, E)
        if self.similarity == "cosine":
            query, key = cosine(query, key)
        local, new_cache = self.extend(key, value, inputs)
        scale = self.temperature() if inputs.temperature is None else inputs.temperature
        out = knn_memory.attend(
            query,
            None if self.attend_to == "all" else self.num_retrieved_memories,
            local,
            scale,
            self.memory_offset,
            self.memory_gate,
            self.dropout_p,
            None if self.memory_mix is None else self._asking(query, scale),
        )  # (B, H, N, E)
        if add_knn_memory:
            added_to = add_leaving(
                added_to,
                local.key,
                local.value,
                kept=self.xl_max_memories,
                length=x.shape[1],
                local_length=inputs.staying(local.local_length, local.key.shape[2]),
                lengths=inputs.lengths,
            )
        if alone and new_cache is not None:
            remember(new_cache, alone)
        out = self.to_out(out.transpose(1, 2).flatten(2))  # (B, N, dim)
        out = out if padding is None else ordered(out, padding.back)
        if self.output_gate is not None:
            out = out * self.output_gate.tanh()
        return (out, new_cache, added_to) if return_memory else (out, new_cache)

    def temperature(self) -> Tensor:
        """What logits are multiplied by, per head (H,): the exponential of what is learned."""
        return temperature_of(self.scale)

    def _asking(self, query: Tensor, scale: Tensor) -> Asking:
        """What the memory is asked with in the place of query (B, H, N, D) and scale (H,)."""
        assert self.memory_mix is not None and self.memory_sharpness is not None
        return Asking(query + query @ self.memory_mix.to(query.dtype), scale * self.memory_sharpness.exp())

    def check_all(
        self,
        x: Tensor,
        inputs: LayerInputs,
        knn_memory: KNNMemory | MemorySnapshot,
        add_to: KNNMemory | MemorySnapshot | None,
    ) -> tuple[MemorySnapshot, MemorySnapshot | None]:
        """`check`, and snapshots of the memories to search and to add to; raises where one does not fit."""
        self.check(x, inputs)
        if inputs.temperature is not None:
            checks.Letters(H=self.heads).bind("temperature", inputs.temperature, "H")
        batch, length, _ = x.shape
        check_tokens("query_mask", inputs.query_mask, batch, length, x.device)
        cached = inputs.xl_memory.shape[-3] if isinstance(inputs.xl_memory, Tensor) else 0
        fitting: dict[str, Any] = {
            "batch": batch,
            "longest": max(length, length + cached - self.xl_max_memories),  # more than N for a foreign, longer cache
            "device": x.device,
            "kv_heads": self.kv_heads,
            "width": self.dim_head,
            "value_width": self.value_dim_head,
        }
        searched = snapshot_for("knn_memory", knn_memory, **fitting)
        return searched, None if add_to is None else snapshot_for("add_to", add_to, **fitting)


def _without_forgotten(inputs: LayerInputs, length: int, snapshots: Sequence[MemorySnapshot]) -> LayerInputs:
    """Without the XL cache of rows that a memory forgot since it was made; of a segment of N = `length`."""
    if not isinstance(inputs.xl_memory, Tensor):
        return inputs
    if not torch.compiler.is_compiling():
        check_cache_known(inputs.xl_memory, inputs.local_length, snapshots)
    cleared = cleared_since([inputs.xl_memory], snapshots)
    if cleared is None:
        return inputs
    seen = inputs.local_length
    seen = torch.full_like(cleared, length + inputs.xl_memory.shape[-3], dtype=torch.int64) if seen is None else seen
    return inputs._replace(local_length=torch.where(cleared, seen.clamp(max=length), seen))
