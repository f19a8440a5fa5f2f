"""What the rows of a batch carry from segment to segment: KNN memories and XL caches, cleared when a document ends.

Shapes: B rows, N tokens of a segment, X cached XL tokens, G key/value heads, D head width, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from memtrans.attention import LocalContext
from memtrans.data import Batch
from memtrans.transformer import MemorizingTransformer


class DocumentReader:
    """Reads segments with a model and remembers, for every row, what its document said.

    XL caches have their full size from the start, so that no shape ever changes; `xl_length` tells how much of them is
    the row's document. Nothing here waits for the device.

    Args:
        model: on its device. batch: B. spare: S, entries added between a forward pass and its backward.
        retrieval: False keeps every memory empty.
    """

    def __init__(self, model: MemorizingTransformer, batch: int, spare: int = 0, retrieval: bool = True) -> None:
        self.model, self.retrieval = model, retrieval
        device = model.token_emb.weight.device
        smallest = {} if retrieval else {"max_memories": 1}  # a memory that stays empty need not be searched at length
        self.memories = model.create_knn_memories(batch_size=batch, device=device, spare=spare, **smallest)
        groups = () if model.kv_heads == 1 else (model.kv_heads,)
        attentions = [module for module in model.modules() if isinstance(module, LocalContext)]
        self.xl_capacity = max(attention.xl_max_memories for attention in attentions)
        size = (batch, *groups, self.xl_capacity, 2, model.dim_head)
        self.xl_memories = [torch.zeros(size, device=device) for _ in model.xl_memory_layers]
        self.xl_length = torch.zeros(batch, dtype=torch.int64, device=device)

    def read(self, batch: Batch) -> Tensor:
        """Logits (B, N, V) of a segment on the model's device; memories and caches move on."""
        self.memories.clear_rows(batch.fresh)
        self.xl_length = self.xl_length.masked_fill(batch.fresh, 0)
        result = self.model(
            batch.tokens,
            knn_memories=self.memories,
            xl_memories=self.xl_memories or None,
            add_knn_memory=self.retrieval,
            lengths=batch.lengths,
            xl_length=self.xl_length,
        )
        if not self.xl_memories:
            return result
        logits, self.xl_memories = result
        self.xl_length = (self.xl_length + batch.tokens.shape[1]).clamp(max=self.xl_capacity)
        return logits

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Two parts: the memories, the XL caches."""
        caches = {str(place): cache for place, cache in enumerate(self.xl_memories)}
        return {"memories": self.memories.state_dict(), "xl": {**caches, "length": self.xl_length}}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes up what `state_dict` returned. Raises ValueError when it is of another model."""
        if self.memories:
            self.memories.load_state_dict(state["memories"])
        caches = {str(place): cache for place, cache in enumerate(self.xl_memories)}
        expected = {**caches, "length": self.xl_length}
        found = {name: tuple(tensor.shape) for name, tensor in state["xl"].items()}
        if found != {name: tuple(tensor.shape) for name, tensor in expected.items()}:
            raise ValueError(f"state must hold XL caches of this model, got shapes {found}")
        for name, tensor in expected.items():
            tensor.copy_(state["xl"][name])
