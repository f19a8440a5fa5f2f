"""What a memorizing layer gives each entry and each local key, in one softmax over all that a document ever stored."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from memtrans import KNNAttention


@dataclass
class Document:
    """One row as the definition has it: everything that it stored, and what is still in its XL cache; (G, n, D)."""

    layer: KNNAttention
    most: int  # entries that a search may find
    stored: list[Tensor] = field(default_factory=list)  # keys (G, D), in their order
    cached: list[Tensor] = field(default_factory=list)

    def weights(self, query: Tensor, key: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Of query (H, N, D), with the segment's keys (G, N, D): to all stored (H, N, stored), to all local keys."""
        layer, heads = self.layer, self.layer.heads
        group = torch.arange(heads) // (heads // layer.kv_heads)
        local = torch.stack([*self.cached, *key.unbind(1)], dim=1)[group]  # (H, L, D)
        length, local_keys, scale = query.shape[1], local.shape[1], layer.temperature()[:, None, None]
        distance = torch.arange(local_keys - length, local_keys)[:, None] - torch.arange(local_keys)
        apart = distance if layer.causal else distance.abs()
        to_local = capped(layer, scale * query @ local.mT) + table[:, apart.clamp(0, table.shape[1] - 1)]
        if layer.causal:
            to_local = to_local.masked_fill(distance < 0, -torch.inf)
        to_memory = torch.full((heads, length, len(self.stored)), -torch.inf, dtype=torch.float64)
        first = max(0, len(self.stored) - self.most)
        if self.stored:
            asked, memory_scale = query, scale
            if layer.memory_mix is not None and layer.memory_sharpness is not None:
                asked = query + query @ layer.memory_mix
                memory_scale = scale * layer.memory_sharpness.exp()[:, None, None]
            scores = asked @ torch.stack(self.stored, dim=1)[group, first:].mT
            best = scores.topk(min(layer.num_retrieved_memories, scores.shape[2]), dim=2)
            logits = capped(layer, memory_scale * best.values)
            if layer.memory_offset is not None:
                logits = logits + layer.memory_offset[:, None, None]
            to_memory[:, :, first:] = to_memory[:, :, first:].scatter(2, best.indices, logits)
        if layer.memory_gate is None:
            parts = [to_memory, to_local]
            if layer.sink is not None:
                parts.append(layer.sink[:, None, None].expand(heads, length, 1))
            return (
                torch.cat(parts, dim=2)
                .softmax(2)[..., : len(self.stored) + local_keys]
                .split([len(self.stored), local_keys], dim=2)
            )
        gate = layer.memory_gate.sigmoid()[:, None, None] if self.stored else torch.zeros(heads, 1, 1).double()
        memory = to_memory.softmax(2) if self.stored else to_memory
        return gate * memory, (1 - gate) * to_local.softmax(2)

    def go_on(self, key: Tensor, kept: int) -> None:
        """Stores what leaves the XL cache of a segment's keys (G, N, D)."""
        local = [*self.cached, *key.unbind(1)]
        leaving = max(0, len(local) - kept)
        self.stored += local[:leaving]
        self.cached = local[leaving:]


def begun(layer: KNNAttention) -> KNNAttention:
    """The same layer, where what it learns of its memory does not stand at 0 any more."""
    for parameter in (layer.memory_gate, layer.memory_mix, layer.memory_sharpness):
        if parameter is not None:
            torch.nn.init.normal_(parameter)
    return layer


def capped(layer: KNNAttention, products: Tensor) -> Tensor:
    return products if layer.soft_cap is None else layer.soft_cap * (products / layer.soft_cap).tanh()


def dense(positions: Tensor, weights: Tensor, stored: int) -> Tensor:
    """Weights (H, Q, K) by position (H, Q, stored)."""
    by_position = torch.zeros(*weights.shape[:2], stored + 1, dtype=weights.dtype)
    return by_position.scatter_add(2, positions + 1, weights)[..., 1:]
