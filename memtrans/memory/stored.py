"""A memory's place: its arguments, its ring, and the documents in scope.

What people call stands above it: `saved.py` for state and files, `knn_memory.py` for add, search and clear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from memtrans.checks import sizes
from memtrans.compatibility import UNUSED, warn_unused
from memtrans.devices import usable_device
from memtrans.distributed.ranks import ranks_of
from memtrans.memory.announcement import announcement
from memtrans.memory.checks import check_no_recomputation, document_numbers, running_backward
from memtrans.memory.observation import Watch
from memtrans.memory.ring import Ring
from memtrans.memory.sharded_ring import ShardedRing
from memtrans.memory.snapshot import MemorySnapshot
from memtrans.memory.state import dtype_names
from memtrans_kernels import checks
from memtrans_kernels.backends import check_name

Method = TypeVar("Method", bound=Callable[..., Any])
MemoryType = TypeVar("MemoryType", bound="StoredMemory")


def _constant_when_traced(method: Method) -> Method:
    """Marks `method` as `torch.compiler.assume_constant_result` does, which imports the compiler: over a second."""
    method._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return method


class StoredMemory:
    """What `KNNMemory` is made of: B documents on one device, or on none yet; `KNNMemory` describes the arguments."""

    def __init__(
        self,
        dim: int,
        max_memories: int = 16000,
        num_indices: int = 1,
        memmap_filename: Any = UNUSED,
        multiprocessing: Any = UNUSED,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        value_dtype: torch.dtype | None = None,
        kv_heads: int = 1,
        spare: int | Literal["grow"] = 0,
        backend: str = "auto",
        process_group: dist.ProcessGroup | None = None,
        keep_ids: bool = False,
        value_dim: int | None = None,
    ) -> None:
        warn_unused(memmap_filename=memmap_filename, multiprocessing=multiprocessing)
        checks.stored(dtype=dtype, value_dtype=value_dtype)
        self.dim, self.max_memories, self.num_indices, self.kv_heads = sizes(
            1, dim=dim, max_memories=max_memories, num_indices=num_indices, kv_heads=kv_heads
        )
        self.value_dim = self.dim if value_dim is None else checks.integer("value_dim", value_dim, low=1)
        heads = () if self.kv_heads == 1 else (self.kv_heads,)
        of_entry = (2, self.dim) if self.value_dim == self.dim else (self.dim + self.value_dim,)
        self.shape = (self.num_indices, *heads, self.max_memories, *of_entry)
        self.dtype, self.value_dtype = dtype, value_dtype
        self.keep_ids = bool(keep_ids)
        self.grows, self.backend = spare == "grow", check_name(backend)
        self.spare = 0 if self.grows else checks.integer("spare", spare, low=0)
        self.scoped_indices = list(range(self.num_indices))
        self._ranks = None if process_group is None else ranks_of(process_group)
        self.made_in = running_backward()
        self.watch = Watch()
        self._announcement = announcement()
        self._cleared: Tensor | None = None  # how often each row was (R,), where the ring that knows it is to come
        self._ring: Ring | None = None
        self._rows: Tensor | None = None
        if device is not None:
            self._prepare(usable_device(device), 0)

    # ------------------------------------------------------------------------------------------------- storage

    @_constant_when_traced
    def _room(self) -> int:
        """The longest segment that the ring has spare slots for, or will have where it is not laid out yet."""
        return self.spare if self._ring is None else self._ring.spare

    @_constant_when_traced  # a traced forward meets a memory that is laid out already
    @torch.inference_mode(False)  # a memory that first met an evaluation can be trained with later
    def _prepare(self, device: torch.device, longest: int) -> None:
        """Lays the ring out on `device`, with spare slots for a segment of `longest` entries."""
        if self._ring is None:
            self._ring = self._new_ring(device, max(self.spare, longest))
            self._rows = self._scoped_rows()
            if self._cleared is not None:
                self._ring.clearings.take_up(self._cleared.to(device))
        elif longest > self._ring.spare:
            self._ring.widen(longest)
        self.spare = max(self.spare, longest)

    def _count_cleared(self, documents: Iterable[int]) -> None:
        """Counts that they are forgotten, for a ring to come: XL caches beside what was loaded may be older."""
        if self._cleared is not None:
            rows = [document * self.kv_heads + group for document in documents for group in range(self.kv_heads)]
            counts = self._cleared.clone()
            counts[rows] += 1
            self._cleared = counts

    def _forget_storage(self) -> None:
        self._ring, self._rows = None, None

    def _new_ring(self, device: torch.device, spare: int) -> Ring:
        if device.type == "meta":
            raise ValueError(f"device must be one that keeps values, got {str(device)!r}")
        dtype = self.dtype or (torch.float16 if device.type == "cuda" else torch.float32)
        value_dtype = self.value_dtype or dtype
        size = (self.num_indices * self.kv_heads, self.max_memories, spare, self.dim)
        of_entry = self.dim * dtype.itemsize + self.value_dim * value_dtype.itemsize + (8 if self.keep_ids else 0)
        share = -(-self.max_memories // (1 if self._ranks is None else self._ranks.size))
        self._announcement.say(size[0] * (share + spare) * of_entry, self.shape)
        storage: dict[str, Any] = {"key_dtype": dtype, "value_dtype": value_dtype}
        storage |= {"device": device, "backend": self.backend, "unbounded": self.grows, "keep_ids": self.keep_ids}
        storage |= {"watch": self.watch, "value_dim": self.value_dim}
        if self._ranks is None:
            return Ring(*size, **storage)
        resolved = {"dtype": dtype, "value_dtype": value_dtype, "device": device.type}
        self._ranks.agree(**{**self.configuration(), **resolved})
        return ShardedRing(*size, ranks=self._ranks, **storage)

    @property
    def device(self) -> torch.device | None:
        """Where the memory lives; None before it saw a tensor."""
        return None if self._ring is None else self._ring.keys.device

    @property
    def lengths(self) -> Tensor:
        """How many entries each document holds (num_indices,)."""
        if self._ring is None:
            return torch.zeros(self.num_indices, dtype=torch.int64)
        return self._ring.lengths().reshape(self.num_indices, self.kv_heads)[:, 0].clone()

    def snapshot(self, like: Tensor | None = None, longest: int = 0) -> MemorySnapshot:
        """The memory as it stands, for the documents in scope.

        Args:
            like: a tensor whose device the memory takes if it has none yet. Default: it must have one.
            longest: the longest segment that will be added before the next snapshot.

        Raises:
            ValueError: the memory has no device yet, or another one than `like`.
            RuntimeError: activation checkpointing runs a forward pass again.
        """
        check_no_recomputation("the memory", self.made_in)
        return self.as_it_stands(None if like is None else like.device, longest)

    def as_it_stands(self, device: torch.device | None, longest: int) -> MemorySnapshot:
        """A snapshot for a caller who knows that no forward pass is run again."""
        if device is not None:
            # Before the first look at the ring: see there. Only a length that makes it grow is made a constant,
            # by range(). No branch: a compiler that begins again finds the ring grown.
            self._prepare(device, len(range(longest if longest > self._room() else 0)))
        ring, rows = self._ring, self._rows
        if ring is None or rows is None:
            raise ValueError("device must be given to a memory that has seen no tensor yet, got None")
        if device is not None and device != rows.device:
            raise ValueError(
                f"the memory lives on {rows.device}, got a tensor on {device}: memory.to({str(device)!r}) moves it"
            )
        assert device is None or longest <= ring.spare  # a compiled graph asks it of every memory that it is given
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # what an evaluation takes can be trained with later
                return ring.snapshot(rows, self._host_rows(), len(self.scoped_indices))
        return ring.snapshot(rows, self._host_rows(), len(self.scoped_indices))

    def still_holds(self, snapshot: MemorySnapshot) -> bool:
        """Whether what the snapshot reads is where the memory keeps its entries now: it was neither widened nor loaded.

        Asks the host alone.
        """
        return self._ring is snapshot.ring and self._ring.keys_read is snapshot.keys

    def clearings(self) -> Tensor:
        """How often each row was cleared (R,), on the device; the same tensor until one is cleared."""
        assert self._ring is not None  # of a memory that was read
        return self._ring.clearings.as_they_stand()

    # --------------------------------------------------------------------------------------------------- scope

    def _host_rows(self) -> list[int]:
        return [b * self.kv_heads + g for b in self.scoped_indices for g in range(self.kv_heads)]

    @torch.inference_mode(False)  # see _prepare
    def _scoped_rows(self) -> Tensor:
        assert self._ring is not None
        rows = torch.tensor(self._host_rows(), dtype=torch.int64, device="cpu")
        if self._ring.keys.is_cuda:
            rows = rows.pin_memory()
        return rows.to(self._ring.keys.device, non_blocking=True)

    def set_scoped_indices(self, indices: Iterable[int]) -> None:
        """Makes `add` and `search` speak of these documents, in this order.

        Raises ValueError when there is none, or one is repeated or out of range.
        """
        chosen = document_numbers("indices", indices, self.num_indices)
        if not chosen:
            raise ValueError("indices must name at least one document, got []")
        if chosen == self.scoped_indices:
            return
        self.scoped_indices = chosen
        if self._ring is not None:
            self._rows = self._scoped_rows()

    @contextmanager
    def at_batch_indices(self: MemoryType, indices: Iterable[int]) -> Iterator[MemoryType]:
        """Scopes the memory to some documents inside a `with`; the old scope comes back even after an exception."""
        previous = self.scoped_indices
        self.set_scoped_indices(indices)
        try:
            yield self
        finally:
            self.set_scoped_indices(previous)

    def configuration(self) -> dict[str, Any]:
        """The arguments that make a memory like this on any device, as JSON can say them."""
        names = ("dim", "max_memories", "num_indices", "kv_heads", "spare")
        dtypes = dtype_names(dtype=self.dtype, value_dtype=self.value_dtype)
        arguments = {name: getattr(self, name) for name in names} | dtypes
        if self.keep_ids:  # not said where it is off, as before there were ids
            arguments["keep_ids"] = True
        if self.value_dim != self.dim:  # likewise
            arguments["value_dim"] = self.value_dim
        return {**arguments, "spare": "grow"} if self.grows else arguments
