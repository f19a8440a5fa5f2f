"""What the memories of a model's layers hold for the documents of a batch, and which tokens that were."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memtrans.hf.masks import Padding
from memtrans.hf.probe import Layer
from memtrans.hf.settings import MemorySettings
from memtrans.hf.state import Stored, kept
from memtrans.memory import KNNMemory, KNNMemoryList
from memtrans.memory.announcement import made_together
from memtrans.memory.checks import check_mask
from memtrans.memory.snapshot import MemorySnapshot
from memtrans.storage import load_tensors, save_tensors

KIND = "memtrans.hf.Entries"
IDS, READ = "ids", "read"


class Entries:
    """The memories of B documents, one for each chosen layer, and a memory of the tokens' ids.

    Args:
        layers: by number. settings: of `add_memory`. documents: B. as_they_are: whether values are, for a calibration.

    Attributes:
        memories: by layer. ids: what was read, in float32, exact below 2^24, and in place of values where it stood in
            its document, in float64; None where they are not kept. read: (B,) int64, tokens that each document had.
        as_they_are: as given.
    """

    as_they_are = False  # in a model that was saved whole by an earlier version

    def __init__(
        self, layers: Mapping[int, Layer], settings: MemorySettings, documents: int, as_they_are: bool = False
    ) -> None:
        self.documents, self.as_they_are = documents, as_they_are
        sizes: dict[str, Any] = {"max_memories": settings.max_memories, "num_indices": documents}
        spare = _spare(settings)
        with made_together(0):  # `Held.lay_out` has said what they take
            self.memories = {
                number: KNNMemory(
                    dim=layer.width,
                    value_dim=layer.held_width(as_they_are),
                    kv_heads=layer.kv_heads,
                    dtype=settings.dtype or layer.dtype,
                    device=layer.learned.memory_offset.device,
                    spare=spare,
                    backend=settings.backend,
                    **sizes,
                )
                for number, layer in layers.items()
            }
        self._live: dict[int, MemorySnapshot] = {}
        self.first = next(iter(self.memories.values()))
        self.ids: KNNMemory | None = None
        if settings.keep_ids:
            device = self.first.device
            kinds: dict[str, Any] = {"dtype": torch.float32, "value_dtype": torch.float64}
            self.ids = KNNMemory(1, **kinds, device=device, spare=spare, backend="reference", **sizes)
        with torch.inference_mode(False):  # a memory that inference began may be written in training
            self.read = torch.zeros(documents, dtype=torch.int64, device=self.first.device)

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

    def live(self) -> dict[int, MemorySnapshot]:
        """Every layer's memory whenever it is read, for passes that add nothing and have no gradients: no copies."""
        if not all(view.keys is view.ring.keys_read for view in self._live.values()):  # laid out again
            self._live = {}
        if not self._live:
            self._live = {number: view.live() for number, view in self.snapshots().items()}
        return dict(self._live)

    def follow(self, layers: Mapping[int, Layer]) -> None:
        """Moves what each layer's memory holds to where the layer is by now. Raises ValueError for one on meta."""
        places = {number: layer.learned.memory_offset.device for number, layer in layers.items()}
        moved = {number: place for number, place in places.items() if place != self.memories[number].device}
        for number, device in moved.items():
            if device.type == "meta":
                raise ValueError(
                    f"layers with a memory must be on a device that keeps values, got layer {number} on meta: offload "
                    f"a model before add_memory"
                )
        for number, device in moved.items():
            self.memories[number].to(device)
        if moved:
            self._live = {}
            self.read = self.read.to(self.first.device)
            if self.ids is not None:
                self.ids.to(self.first.device)

    def clear_rows(self, mask: Tensor) -> None:
        """Forgets the documents where mask (B,) bool is True."""
        check_mask(mask, self.documents)
        for memory in self.all():
            memory.clear_rows(mask.to(memory.device))
        self.read.masked_fill_(mask.to(self.read.device), 0)

    def store(
        self,
        standing: Mapping[int, MemorySnapshot],
        tokens: Tensor,
        sink: int,
        padding: Padding | None,
        stored: Mapping[int, Stored],
    ) -> None:
        """Adds what a pass saw: in every memory or, where that fails or is interrupted, in none.

        standing: the layers' memories as they stood before it. tokens: (B, N), its ids. stored: what its layers add.
        """
        before = [*standing.values()]
        try:
            for number, added in stored.items():
                standing[number].append(*added)
            if self.ids is not None:
                before.append(self.ids.snapshot())
                before[-1].append(*self._named(self.ids, tokens, sink, padding))
            self.read += tokens.shape[1] if padding is None else padding.real.to(self.read.device)
        except BaseException:
            for snapshot in before:
                snapshot.ring.cursor.copy_(snapshot.cursor)  # spare slots took what was added: nothing is overwritten
            raise

    def _named(self, memory: KNNMemory, tokens: Tensor, sink: int, padding: Padding | None) -> Stored:
        """The ids (B, N) of what a pass stores, and where in the document they stand."""
        first = self.read[:, None] if padding is None else (self.read - padding.left.to(self.read.device))[:, None]
        at = first + torch.arange(tokens.shape[1], device=self.read.device)  # (B, N)
        ids, count = kept(tokens.to(memory.device).float()[:, None, :, None], sink, padding)
        positions, _ = kept(at.double()[:, None, :, None], sink, padding)
        return Stored(ids, positions, count)

    def ids_of(self, document: int) -> Tensor:
        """The ids of the tokens that a document holds, old to new (n,) int64."""
        if self.ids is None:
            raise ValueError("keep_ids must be True from the first token on for ids to be known, got False")
        state, length = self.ids.state_dict(), int(self.lengths[document])
        held = state["keys"][document, :, 0]
        return held[held.shape[0] - length :].long()

    def save(self, path: Path) -> None:
        """Writes one safetensors file, atomically."""
        named: dict[str, Any] = {str(number): memory for number, memory in self.memories.items()}
        if self.ids is not None:
            named[IDS] = self.ids
        state = {f"{name}.{field}": t for name, memory in named.items() for field, t in memory.state_dict().items()}
        state[READ] = self.read.clone()
        save_tensors(path, state, KIND, {"documents": self.documents})

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what `read_entries` gave. Raises ValueError when it is of other layers.

        Without ids in it none are kept from now on: those that come later would not stand beside their entries.
        Files of earlier versions do not say where tokens stood: their positions count from the oldest entry.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        read = state.get(READ)
        for name, tensor in state.items():
            if name == READ:
                continue
            layer, _, field = name.partition(".")
            parts.setdefault(layer, {})[field] = tensor
        ids = parts.pop(IDS, None)
        if set(parts) != {str(number) for number in self.memories}:
            raise ValueError(f"entries must be of layers {list(self.memories)}, got {sorted(parts)}")
        if read is not None and (read.shape != self.read.shape or read.dtype != torch.int64):
            raise ValueError(f"{READ} must be int64 of shape ({self.documents},), got {read.dtype} {tuple(read.shape)}")
        for number, memory in self.memories.items():
            memory.check_state(parts[str(number)])  # all of them before the first is replaced
        if self.ids is not None and ids is not None:
            self.ids.check_state(ids)
        for number, memory in self.memories.items():
            memory.load_state_dict(parts[str(number)])
        if ids is None:
            self.ids = None
        elif self.ids is not None:
            counted = ids if read is not None else {**ids, "values": _counted(ids)}
            self.ids.load_state_dict(counted)
        self.read.copy_(self.lengths if read is None else read)


def bytes_per_document(layers: Mapping[int, Layer], settings: MemorySettings, as_they_are: bool = False) -> int:
    """Bytes that the memories of one document take, spare slots included; arguments as of `Entries`."""
    slots = settings.max_memories + _spare(settings)
    return slots * sum(
        layer.kv_heads * (layer.width + layer.held_width(as_they_are)) * (settings.dtype or layer.dtype).itemsize
        for layer in layers.values()
    )


def _spare(settings: MemorySettings) -> int:
    """How many slots a document has beside those of the entries that it keeps."""
    return max(settings.spare, settings.segment)


def read_entries(path: Path) -> tuple[dict[str, Tensor], int]:
    """What `Entries.save` wrote, and of how many documents it is; ValueError where its tensors are of others."""
    state, configuration = load_tensors(path, KIND)
    documents = configuration.get("documents")
    rows = [tensor.numel() for name, tensor in state.items() if name.endswith(".lengths")]
    # asked before memories for so many are made, which may be more than a machine can hold
    if type(documents) is not int or documents < 1 or not rows or any(n == 0 or n % documents for n in rows):
        raise ValueError(f"documents must be how many the entries are of, got {documents!r} in {str(path)!r}")
    return state, documents


def _counted(ids: Mapping[str, Tensor]) -> Tensor:
    """For each of the ids of a state, how many of its document are older (B, entries, 1) float64."""
    entries = ids["keys"].shape[1]
    place = torch.arange(entries) - (entries - ids["lengths"])[:, None]  # filler stands before a row's oldest
    return place.clamp(min=0).double()[..., None]
