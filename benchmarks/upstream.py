"""The arithmetic of memorizing-transformers-pytorch 0.4.1 on the device of the tensors, in its best case.

Its own memory is an approximate index on the CPU. Here pairs of keys and values lie beside the model in its dtype, and
the search is a matrix product and `topk`, a document at a time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(query: Tensor, key: Tensor, value: Tensor, retrieved: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """One softmax over concatenated logits; (B, H, N, D).

    retrieved (B, H, N, K, 2, D) · scale (H, 1, 1) · bias (..., H, N, L)
    """
    groups, (length, local), neighbours = key.shape[1], bias.shape[-2:], retrieved.shape[3]
    memory_key, memory_value = retrieved.unbind(dim=-2)
    of_group = query.unflatten(1, (groups, -1))
    near = torch.einsum("bghnd,bgld->bghnl", of_group, key).flatten(1, 2) * scale + bias
    future = torch.ones(length, local, dtype=torch.bool, device=query.device).triu(local - length + 1)
    far = torch.einsum("bhnd,bhnkd->bhnk", query, memory_key) * scale
    logits = torch.cat((far, near.masked_fill(future, -torch.inf)), dim=-1)
    to_memory, to_local = logits.softmax(dim=-1).split([neighbours, local], dim=-1)
    local_out = torch.einsum("bghnl,bgld->bghnd", to_local.unflatten(1, (groups, -1)), value).flatten(1, 2)
    return torch.einsum("bhnk,bhnkd->bhnd", to_memory, memory_value) + local_out


class Layer(nn.Module):
    """Projects, searches, attends, adds.

    memory: (B, G, M, 2, D), full; its oldest entries are overwritten. neighbours: K.
    """

    def __init__(self, dim: int, heads: int, memory: Tensor, neighbours: int) -> None:
        super().__init__()
        _, self.groups, _, _, self.width = memory.shape
        self.heads, self.neighbours = heads, neighbours
        self.to_q = nn.Linear(dim, heads * self.width, bias=False)
        self.to_kv = nn.Linear(dim, self.groups * self.width * 2, bias=False)
        self.to_out = nn.Linear(heads * self.width, dim, bias=False)
        self.scale = nn.Parameter(torch.full((heads, 1, 1), math.log(20.0)))
        self.memory = memory
        self.cursor = torch.zeros((), dtype=torch.int64, device=memory.device)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, N, dim), bias (1, H, N, N)"""
        query = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.to_kv(x).unflatten(-1, (2, self.groups, -1)).permute(2, 0, 3, 1, 4)
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        out = attend(query, key, value, self.search(query.detach()), self.scale.exp(), bias)
        self.add(torch.stack((key.detach(), value.detach()), dim=-2))
        return self.to_out(out.transpose(1, 2).flatten(2))

    def search(self, query: Tensor) -> Tensor:
        """(B, H, N, K, 2, D)"""
        found = []
        for of_document, pairs in zip(query, self.memory, strict=True):
            scores = of_document.reshape(self.groups, -1, self.width) @ pairs[:, :, 0].transpose(1, 2)
            slots = scores.topk(self.neighbours, dim=-1).indices  # (G, H / G · N, K)
            group = torch.arange(self.groups, device=query.device)[:, None, None]
            found.append(pairs[group, slots].reshape(*of_document.shape[:2], self.neighbours, 2, self.width))
        return torch.stack(found)

    def add(self, pairs: Tensor) -> None:
        slots = (self.cursor + torch.arange(pairs.shape[2], device=pairs.device)) % self.memory.shape[2]
        self.memory.index_copy_(2, slots, pairs)
        self.cursor += pairs.shape[2]
