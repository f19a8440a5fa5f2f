"""What the memories of a model's layers hold for the documents of a batch, and which tokens that were."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memtrans.hf.probe import Layer
from memtrans.hf.settings import MemorySettings
from memtrans.hf.state import Padding, kept
from memtrans.memory import KNNMemory, KNNMemoryList
from memtrans.memory.ring import MemorySnapshot
from memtrans.storage import load_tensors, save_tensors

KIND = "memtrans.hf.Entries"
IDS = "ids"


class Entries:
    """The memories of B documents, one for each chosen layer, and a memory of the tokens' ids.

    Args:
        layers: by number. settings: of `add_memory`. documents: B.

    Attributes:
        memories: by layer. ids: what was read, in float32, exact below 2^24; None where they are not kept.
    """

    def __init__(self, layers: Mapping[int, Layer], settings: MemorySettings, documents: int) -> None:
        self.documents = documents
        sizes: dict[str, Any] = {"max_memories": settings.max_memories, "num_indices": documents}
        spare = max(settings.spare, settings.segment)
        self.memories = {
            number: KNNMemory(
                dim=layer.width,
                kv_heads=layer.kv_heads,
                dtype=settings.dtype or layer.dtype,
                device=layer.learned.memory_offset.device,
                spare=spare,
                backend=settings.backend,
                **sizes,
            )
            for number, layer in layers.items()
        }
        self.first = next(iter(self.memories.values()))
        self.ids: KNNMemory | None = None
        if settings.keep_ids:
            device = self.first.device
            self.ids = KNNMemory(1, dtype=torch.float32, device=device, spare=spare, backend="reference", **sizes)

    @property
    def lengths(self) -> Tensor:
        """How many entries each document holds (B,)."""
        return self.first.lengths

    def all(self) -> KNNMemoryList:
        """Every memory, that of the ids last."""
        return KNNMemoryList([*self.memories.values(), *([] if self.ids is None else [self.ids])])

    def snapshots(self) -> dict[int, MemorySnapshot]:
        """Every layer's memory as it stands."""
        return {number: memory.snapshot() for number, memory in self.memories.items()}

    def clear_rows(self, mask: Tensor) -> None:
        """Forgets the documents where mask (B,) bool is True."""
        for memory in self.all():
            memory.clear_rows(mask.to(memory.device))

    def note(self, tokens: Tensor, sink: int, padding: Padding | None) -> None:
        """Keeps the ids (B, N) of what a pass stores."""
        if self.ids is not None:
            ids, count = kept(tokens.to(self.ids.device).float()[:, None, :, None], sink, padding)
            self.ids.snapshot().append(ids, ids, count)

    def ids_of(self, document: int) -> Tensor:
        """The ids of the tokens that a document holds, old to new (n,) int64."""
        if self.ids is None:
            raise ValueError("keep_ids must be True for the ids of tokens to be known, got False")
        state, length = self.ids.state_dict(), int(self.lengths[document])
        held = state["keys"][document, :, 0]
        return held[held.shape[0] - length :].long()

    def save(self, path: Path) -> None:
        """Writes one safetensors file, atomically."""
        named: dict[str, Any] = {str(number): memory for number, memory in self.memories.items()}
        if self.ids is not None:
            named[IDS] = self.ids
        state = {f"{name}.{field}": t for name, memory in named.items() for field, t in memory.state_dict().items()}
        save_tensors(path, state, KIND, {"documents": self.documents})

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what `read_entries` gave. Raises ValueError when it is of other layers."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            layer, _, field = name.partition(".")
            parts.setdefault(layer, {})[field] = tensor
        ids = parts.pop(IDS, None)
        if set(parts) != {str(number) for number in self.memories}:
            raise ValueError(f"entries must be of layers {list(self.memories)}, got {sorted(parts)}")
        for number, memory in self.memories.items():
            memory.check_state(parts[str(number)])  # all of them before the first is replaced
        for number, memory in self.memories.items():
            memory.load_state_dict(parts[str(number)])
        if self.ids is not None and ids is not None:
            self.ids.load_state_dict(ids)


def read_entries(path: Path) -> tuple[dict[str, Tensor], int]:
    """What `Entries.save` wrote, and of how many documents it is."""
    state, configuration = load_tensors(path, KIND)
    return state, int(configuration["documents"])
