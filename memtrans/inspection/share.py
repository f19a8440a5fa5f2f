"""How much of a memory layer's attention goes to the memory, and how full the memory is.

Shapes: B rows, N tokens of a segment, H query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from memtrans.attention import LayerInputs
from memtrans.knn_attention import KNNAttention
from memtrans.memory.memory_list import KNNMemoryList
from memtrans.memory.snapshot import MemorySnapshot
from memtrans.transformer import MemorizingTransformer
from memtrans_kernels import cosine


def memory_share(attention: KNNAttention, x: Tensor, inputs: LayerInputs, snapshot: MemorySnapshot) -> Tensor:
    """The weight of the retrieved keys in the attention of each query, from 0 to 1 (B, H, N) float32.

    Attention is linear in the values: with ones in the place of the local ones its output grows by the weight of the
    local keys. So every way to combine both and every backend is measured as it computes.

    Args:
        attention: the layer. x: (B, N, dim), what it is given. inputs: of its forward. snapshot: of the memory it
            searches.
    """
    query, key, value = attention.project(x)
    query, key = cosine(query, key)
    local, _ = attention.extend(key, value, inputs)
    temperature = attention.temperature() if inputs.temperature is None else inputs.temperature

    def output(local_values: Tensor) -> Tensor:
        return snapshot.attend(
            query,
            attention.num_retrieved_memories,
            local._replace(value=local_values),
            temperature,
            attention.memory_offset,
            attention.memory_gate,
            0.0,
        )[..., 0].float()

    local_weight = output(torch.ones_like(local.value)) - output(torch.zeros_like(local.value))
    return (1 - local_weight).clamp(0, 1)


@contextmanager
def shares_of(model: MemorizingTransformer) -> Iterator[list[Tensor]]:
    """A list that gets the shares (B, H, N) of each memory layer that is called as long as the `with` lasts."""
    found: list[Tensor] = []

    def spy(attention: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        assert isinstance(attention, KNNAttention)
        inputs = arguments[1] if len(arguments) > 1 else keywords["inputs"]
        found.append(memory_share(attention, arguments[0], inputs, keywords["knn_memory"]))

    layers = [module for module in model.modules() if isinstance(module, KNNAttention)]
    handles = [layer.register_forward_pre_hook(spy, with_kwargs=True) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measured_share(model: MemorizingTransformer, read: Callable[[], object], counted: Tensor) -> float | None:
    """The mean share over heads, memory layers and the tokens that are counted; None where none is.

    Args:
        model: of which `read` reads a segment, without dropout, and leaves everything as it is. counted: (B, N) bool.
    """
    if not model.memorizing_layers or not bool(counted.any()):
        return None
    was_training = model.training
    model.eval()
    try:
        with shares_of(model) as found:
            read()
    finally:
        model.train(was_training)
    mean = torch.stack([share.mean(dim=1)[counted].mean() for share in found]).mean()
    return float(mean)


def memory_fill(memories: KNNMemoryList) -> float | None:
    """How much of the memories is filled, from 0 to 1; None without one."""
    if not memories:
        return None
    shares = [memory.lengths.double().mean() / memory.max_memories for memory in memories]
    return float(torch.stack(shares).mean())
