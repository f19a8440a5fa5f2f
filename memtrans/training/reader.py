"""What the rows of a batch carry from segment to segment: KNN memories and XL caches, cleared when a document ends.

Shapes: B rows, N tokens of a segment, X cached XL tokens, G key/value heads, D head width, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memtrans.attention import LocalContext
from memtrans.data.stream import Batch
from memtrans.memory.snapshot import MemorySnapshot
from memtrans.pairs import pair_shape
from memtrans.transformer import MemorizingTransformer


class Carried(NamedTuple):
    """What rows carry from segment to segment beside the memories.

    Attributes:
        xl_memories: one (B, X, 2, D), or (B, G, X, 2, D) if G > 1, per caching layer.
        xl_length: (B,) int64, how many of the newest cached tokens are the row's document.
    """

    xl_memories: list[Tensor]
    xl_length: Tensor


class DocumentReader:
    """Reads segments with a model and remembers, for every row, what its document said.

    XL caches have their full size from the start, so that no shape ever changes; `xl_length` tells how much of them is
    the row's document. They keep their addresses too, as a captured CUDA graph asks. Nothing here waits for the device.

    Args:
        model: on its device. batch: B. spare: S, entries added between a forward pass and its backward.
        retrieval: False keeps every memory empty. dtype: what matrix products compute in, float32 or bfloat16.
        max_memories: M. Default: the model's.
        keep_memory: a row's memory survives the end of its document, and the next one reads on in it; the XL cache
            does not.
    """

    def __init__(
        self,
        model: MemorizingTransformer,
        batch: int,
        spare: int = 0,
        retrieval: bool = True,
        dtype: torch.dtype = torch.float32,
        keep_memory: bool = False,
        max_memories: int | None = None,
    ) -> None:
        self.model, self.retrieval, self.dtype, self.keep_memory = model, retrieval, dtype, keep_memory
        self.device = model.device
        self.on_gpu = self.device.type == "cuda"
        if not retrieval:
            max_memories = 1  # a memory that stays empty need not be searched at length
        size = {} if max_memories is None else {"max_memories": max_memories}
        self.memories = model.create_knn_memories(batch_size=batch, device=self.device, spare=spare, **size)
        groups = () if model.kv_heads == 1 else (model.kv_heads,)
        attentions = [module for module in model.modules() if isinstance(module, LocalContext)]
        self.xl_capacity = max(attention.xl_max_memories for attention in attentions)
        shape = (batch, *groups, self.xl_capacity, *pair_shape(model.dim_head, model.value_dim_head))
        caches = [torch.zeros(shape, dtype=dtype, device=self.device) for _ in model.xl_memory_layers]
        self.carried = Carried(caches, torch.zeros(batch, dtype=torch.int64, device=self.device))

    def read(self, batch: Batch) -> Tensor:
        """Logits (B, N, V) of a segment on the model's device; memories and caches move on."""
        logits, carried = self.forward(batch.tokens, batch.lengths, batch.fresh, self.carried)
        self.carry(carried)
        return logits

    @torch.no_grad()
    def losses(self, batch: Batch) -> Tensor:
        """Reads a segment likewise. Returns the nats of each label (B, N), 0 where the model's pad_id is."""
        losses, carried = self.forward(
            batch.tokens, batch.lengths, batch.fresh, self.carried, batch.labels, reduction="none"
        )
        self.carry(carried)
        return losses

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor,
        fresh: Tensor,
        carried: Carried,
        labels: Tensor | None = None,
        reduction: str = "sum",
    ) -> tuple[Tensor, Carried]:
        """The same as a function of what the rows carry, but for the memories, which move on.

        Args:
            tokens: (B, N) int64. lengths: (B,) int64, real tokens. fresh: (B,) bool, rows that begin a document.
            labels: (B, N) int64. reduction: of their losses, "sum" or "none".

        Returns:
            logits (B, N, V), or with `labels` their loss as the model returns it; and what the rows carry after the
            segment.
        """
        if not self.keep_memory:
            self.memories.clear_rows(fresh)
        xl_length = carried.xl_length.masked_fill(fresh, 0)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            result = self.model(
                tokens,
                knn_memories=self.memories,
                xl_memories=carried.xl_memories or None,
                add_knn_memory=self.retrieval,
                lengths=lengths,
                xl_length=xl_length,
                labels=labels,
                reduction=reduction,
            )
        if not carried.xl_memories:
            return result, Carried([], xl_length)
        result, caches = result
        # detached, they say nothing of their own, as those that the first segment is given
        bare = [cache.to(self.dtype).contiguous().detach() for cache in caches]
        return result, Carried(bare, caches.length)

    @torch.no_grad()
    def look(self, tokens: Tensor, lengths: Tensor) -> None:
        """Reads a segment as `forward` would, in rows that go on, for whoever watches the layers; nothing changes."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            self.model(
                tokens,
                knn_memories=self.memories,
                xl_memories=self.carried.xl_memories or None,
                add_knn_memory=False,
                lengths=lengths,
                xl_length=self.carried.xl_length,
            )

    def carry(self, carried: Carried) -> None:
        """Takes what `forward` returned, once nothing needs the old caches for a backward pass any more."""
        for place, cache in zip(self.carried.xl_memories, carried.xl_memories, strict=True):
            place.copy_(cache)
        self.carried.xl_length.copy_(carried.xl_length)

    def snapshots(self) -> list[MemorySnapshot]:
        """The memories as they stand, once a segment was read."""
        return [memory.as_it_stands(None, 0) for memory in self.memories]

    def still_holds(self, snapshots: Sequence[MemorySnapshot]) -> bool:
        """Whether the memories keep their entries where they did then: none was widened or loaded. Asks no device."""
        return all(memory.still_holds(then) for memory, then in zip(self.memories, snapshots, strict=True))

    def _xl(self) -> dict[str, Tensor]:
        return {
            **{str(place): cache for place, cache in enumerate(self.carried.xl_memories)},
            "length": self.carried.xl_length,
        }

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Two parts: the memories, the XL caches."""
        return {"memories": self.memories.state_dict(), "xl": self._xl()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes up what `state_dict` returned. Raises ValueError when it is of another model."""
        if self.memories:
            self.memories.load_state_dict(state["memories"])
        expected = self._xl()
        found = {name: tuple(tensor.shape) for name, tensor in state["xl"].items()}
        if found != {name: tuple(tensor.shape) for name, tensor in expected.items()}:
            raise ValueError(f"state must hold XL caches of this model, got shapes {found}")
        length = state["xl"]["length"]
        if length.dtype != torch.int64 or not bool(((length >= 0) & (length <= self.xl_capacity)).all()):
            raise ValueError(f"state must hold lengths of XL caches in [0, {self.xl_capacity}], got {length.tolist()}")
        for name, tensor in expected.items():
            tensor.copy_(state["xl"][name])
