"""The memory of a Memorizing Transformer: what a document said so far, behind upstream's interface.

`KNNMemory` owns one layer's ring (`ring.py`, or `sharded.py`) and knows its scope, formats and files. The search itself
is an operator of `memtrans_kernels`. Source: Wu et al. 2022, sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from memtrans.checks import check_finite, sizes
from memtrans.compatibility import UNUSED, warn_unused
from memtrans.devices import usable_device
from memtrans.distributed.ranks import ranks_of
from memtrans.memory.checks import (
    check_mask,
    check_memories,
    check_no_recomputation,
    check_numbers,
    check_queries,
    document_numbers,
    running_backward,
)
from memtrans.memory.files import check_configuration, of_class_alone
from memtrans.memory.observation import Watch
from memtrans.memory.ring import MemorySnapshot, Ring
from memtrans.memory.sharded import ShardedRing
from memtrans.memory.state import check_state, dtype_names, holds_nothing, memory_arguments, state_parts
from memtrans.storage import load_tensors, save_tensors
from memtrans_kernels import checks
from memtrans_kernels.backends import check_name

Method = TypeVar("Method", bound=Callable[..., Any])


def _constant_when_traced(method: Method) -> Method:
    """Marks `method` as `torch.compiler.assume_constant_result` does, which imports the compiler: over a second."""
    method._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return method


class KNNMemory:
    """A first-in, first-out memory of (key, value) pairs for each document of a batch, searched exactly.

    Args:
        dim: D, width of keys and values.
        max_memories: M, entries visible per document; the oldest are dropped.
        num_indices: documents in the batch, B.
        memmap_filename: accepted and ignored, with a DeprecationWarning.
        multiprocessing: accepted and ignored, with a DeprecationWarning.
        device: where the memory lives. Default: that of the first tensor it sees.
        dtype: of keys (and values): float32, float16, bfloat16 or float64. Default: float32 on the CPU, float16 on
            CUDA.
        value_dtype: of values. Default: `dtype`.
        kv_heads: G, key/value heads with a memory of their own each.
        spare: S, entries that may be added between a forward pass and its backward. It grows to the longest segment
            added; give N times the number of segments when several come before one backward. In eager mode the ring
            doubles, with a warning, for a backward pass that would come too late, up to 8 times its first size;
            "grow" is 0 with no such limit. A sharded memory, compiled and captured steps raise StaleMemoryError
            instead, which names the number that is enough.
        backend: of search: one of `auto`, `reference`, `triton`, `native`, `faiss`.
        process_group: ranks that hold this memory together, each a share of every document's entries; M is of all of
            them, so it grows with their number. Each rank reads a segment of its own of the same documents; what one
            does with the memory all do, with the same sizes; see `memtrans.memory.sharded`. Default: this process.

    A search of a sharded memory costs what it costs to search M / W entries for the queries of all W ranks. From each
    of the others a rank receives, for one query, D·e + 8·K + K bytes to search, and D·e + 4 to attend or D·e·K / W
    to fetch the winners' values, with e bytes a number; `memtrans.memory.sharded` has what a gradient adds.

    Attributes:
        scoped_indices: the documents that `add` and `search` speak of.
        shape: (num_indices, max_memories, 2, dim), with kv_heads after num_indices if there are several.
        made_in: the number of the backward pass in which the memory was made; -1 outside of one.
        watch: who watches what is retrieved; see `KNNMemoryList.tracing`.

    Raises:
        ValueError, TypeError: a size that is no integer or below 1, another dtype, a device that this torch cannot use
            or that keeps no values (meta), an unknown backend; of a process group, ranks that differ in their arguments
            or kind of device, when they first use the memory.

    >>> memory = KNNMemory(dim=2, max_memories=3, num_indices=1)
    >>> memory.add(torch.tensor([[[[1.0, 0.0], [5.0, 5.0]], [[0.0, 1.0], [7.0, 7.0]]]]))   # (B, N, 2, D)
    >>> key_values, mask = memory.search(torch.tensor([[[0.0, 2.0]]]), topk=1)             # (B, ..., D)
    >>> key_values.tolist(), mask.tolist()
    ([[[[[0.0, 1.0], [7.0, 7.0]]]]], [[[True]]])
    """

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
    ) -> None:
        warn_unused(memmap_filename=memmap_filename, multiprocessing=multiprocessing)
        checks.stored(dtype=dtype, value_dtype=value_dtype)
        self.dim, self.max_memories, self.num_indices, self.kv_heads = sizes(
            1, dim=dim, max_memories=max_memories, num_indices=num_indices, kv_heads=kv_heads
        )
        heads = () if self.kv_heads == 1 else (self.kv_heads,)
        self.shape = (self.num_indices, *heads, self.max_memories, 2, self.dim)
        self.dtype, self.value_dtype = dtype, value_dtype
        self.grows, self.backend = spare == "grow", check_name(backend)
        self.spare = 0 if self.grows else checks.integer("spare", spare, low=0)
        self.scoped_indices = list(range(self.num_indices))
        self._ranks = None if process_group is None else ranks_of(process_group)
        self.made_in = running_backward()
        self.watch = Watch()
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
        elif longest > self._ring.spare:
            self._ring.widen(longest)
        self.spare = max(self.spare, longest)

    def _forget_storage(self) -> None:
        self._ring, self._rows = None, None

    def _new_ring(self, device: torch.device, spare: int) -> Ring:
        if device.type == "meta":
            raise ValueError(f"device must be one that keeps values, got {str(device)!r}")
        dtype = self.dtype or (torch.float16 if device.type == "cuda" else torch.float32)
        value_dtype = self.value_dtype or dtype
        size = (self.num_indices * self.kv_heads, self.max_memories, spare, self.dim)
        storage: dict[str, Any] = {"key_dtype": dtype, "value_dtype": value_dtype}
        storage |= {"device": device, "backend": self.backend, "unbounded": self.grows, "watch": self.watch}
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
                f"the memory lives on {rows.device}, got a tensor on {device}: make or load the memory "
                f"with device={str(device)!r}"
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
    def at_batch_indices(self, indices: Iterable[int]) -> Iterator[KNNMemory]:
        """Scopes the memory to some documents inside a `with`; the old scope comes back even after an exception."""
        previous = self.scoped_indices
        self.set_scoped_indices(indices)
        try:
            yield self
        finally:
            self.set_scoped_indices(previous)

    # ------------------------------------------------------------------------------------- add, search, clear

    def add(self, memories: Tensor, count: Tensor | None = None) -> None:
        """Stores key/value pairs, as they are; the oldest ones make room.

        Args:
            memories: (B, N, 2, D), or (B, G, N, 2, D) when kv_heads > 1; key first, then value. Never differentiated.
            count: (B,) int64, store only the first so many of each document.

        Raises:
            ValueError, TypeError: another shape, dtype or device; on the CPU also values that are NaN.
        """
        checks.tensors(memories=memories)
        checks.floating(memories=memories)
        checks.typed(torch.int64, count=count)
        batch = len(self.scoped_indices)
        check_memories(memories, batch, self.kv_heads, self.dim)
        pairs = memories.detach().reshape(batch, self.kv_heads, memories.shape[-3], 2, self.dim)
        # infinite values saturate, and such keys are never retrieved
        check_numbers("the values in memories", pairs[..., 1, :])
        snapshot = self.snapshot(like=memories, longest=pairs.shape[2])
        snapshot.append(pairs[..., 0, :], pairs[..., 1, :], count)

    def search(
        self,
        queries: Tensor,
        topk: int,
        nprobe: Any = UNUSED,
        increment_hits: Any = UNUSED,
        increment_age: Any = UNUSED,
    ) -> tuple[Tensor, Tensor]:
        """Finds the nearest keys of each query, best first.

        Args:
            queries: (B, ..., D); when kv_heads > 1 the axis after B is the query heads, a multiple of kv_heads.
            topk: K. Where a document holds fewer, the rest is zeros with a False mask.
            nprobe, increment_hits, increment_age: accepted and ignored, with a DeprecationWarning.

        Returns:
            key_values (B, ..., K, 2, D) in the queries' dtype and mask (B, ..., K).

        Raises:
            ValueError, TypeError: another shape, dtype or device, or a topk that is no integer of at least 1; on the
            CPU also queries that are not finite.
        """
        warn_unused(nprobe=nprobe, increment_hits=increment_hits, increment_age=increment_age)
        checks.tensors(queries=queries)
        checks.floating(queries=queries)
        topk = checks.integer("topk", topk, low=1)
        batch = len(self.scoped_indices)
        check_queries(queries, batch, self.kv_heads, self.dim)
        check_finite("queries", queries)
        heads = 1 if self.kv_heads == 1 else queries.shape[1]
        flat = queries.detach().reshape(batch, heads, -1, self.dim)
        *pairs, mask = self.snapshot(like=queries).pairs(flat, topk)
        pairs = [tensor.to(queries.dtype) for tensor in pairs]
        key_values = torch.stack(pairs, dim=-2).masked_fill(~mask[..., None, None], 0.0)
        shape = (*queries.shape[:-1], topk)
        return key_values.reshape(*shape, 2, self.dim), mask.reshape(shape)

    def clear(self, batch_indices: int | Iterable[int] | None = None) -> None:
        """Forgets documents, counted absolutely even inside a scope; all of them by default.

        Raises ValueError or TypeError when one is repeated, out of range or no integer (a mask is for `clear_rows`).
        """
        if batch_indices is None:
            indices = list(range(self.num_indices))
        else:
            several = isinstance(batch_indices, Iterable) and getattr(batch_indices, "ndim", 1) > 0
            given: Any = batch_indices if several else [batch_indices]
            indices = document_numbers("batch_indices", given, self.num_indices)
        if self._ring is not None:
            with self.at_batch_indices(range(self.num_indices)):
                mask = torch.zeros(self.num_indices, dtype=torch.bool, device="cpu")
                mask[indices] = True
                self.clear_rows(mask.to(self._ring.keys.device))

    def clear_rows(self, mask: Tensor) -> None:
        """Forgets the documents in scope where mask (B,) bool, on the memory's device, is True. No host round trip."""
        if self._ring is not None:
            self.snapshot().clear_rows(mask)
        else:
            check_mask(mask, len(self.scoped_indices))

    def cleanup(self) -> None:
        """Changes nothing, as upstream's; `clear()` empties, and storage goes with the last reference to the memory."""

    # ---------------------------------------------------------------------------------------- state and files

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of what the memory holds: keys and values (R, longest row, D), old to new and ending with the newest
        entry, and lengths (R,). Of a sharded memory this rank's share, which `join_shards` puts together."""
        rows = self.num_indices * self.kv_heads
        if self._ring is None:
            keys = torch.zeros(rows, 0, self.dim, dtype=self.dtype)
            values = torch.zeros(rows, 0, self.dim, dtype=self.value_dtype or self.dtype)
            return {"keys": keys, "values": values, "lengths": torch.zeros(rows, dtype=torch.int64)}
        return self._ring.state()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replaces what the memory holds; of a larger memory's entries it keeps the newest.

        A sharded memory takes up its own share, or that of a whole memory's state. A memory that has no device yet
        takes that of the entries, if there are any.

        Raises ValueError or TypeError, and keeps what it held, when the state belongs to another width, batch or number
        of heads, or is a share of another sharding.
        """
        self.check_state(state)
        if self._ring is None and holds_nothing(state):
            return
        device = self.device or state["keys"].device
        self._forget_storage()
        self._prepare(device, 0)
        assert self._ring is not None
        self._ring.load(state)

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError or TypeError unless `load_state_dict` can take the state up."""
        shard = None if self._ranks is None else (self._ranks.rank, self._ranks.size)
        check_state(state, self.num_indices * self.kv_heads, self.dim, shard)

    def configuration(self) -> dict[str, Any]:
        """The arguments that make a memory like this on any device, as JSON can say them."""
        names = ("dim", "max_memories", "num_indices", "kv_heads", "spare")
        dtypes = dtype_names(dtype=self.dtype, value_dtype=self.value_dtype)
        arguments = {name: getattr(self, name) for name in names} | dtypes
        return {**arguments, "spare": "grow"} if self.grows else arguments

    def save(self, path: str | Path) -> None:
        """Writes the memory as one safetensors file, atomically: a file that was there before survives a failure.

        Directories that are missing are made.
        """
        save_tensors(path, self.state_dict(), "memtrans.KNNMemory", self.configuration())

    @of_class_alone
    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str | None = None, **overrides: Any) -> KNNMemory:
        """Reads a memory that `save` wrote; keyword arguments of the constructor override what the file says.

        device: Default: the CPU; of a file without entries, that of the first tensor it sees. Entries are cast to the
        default of that device unless the saved memory had a dtype of its own. Files of earlier versions do not say
        whether it had: theirs stay what they are, and dtype=None, value_dtype=None gives the default.

        Raises ValueError when the file is damaged or not a saved memory, FileNotFoundError when there is none.
        TypeError when called on an instance, whose own entries `load_state_dict` replaces.
        """
        state, configuration = load_tensors(path, "memtrans.KNNMemory")
        keys, values, _ = state_parts(state)
        check_configuration(configuration, keys)
        memory = cls(**{**memory_arguments(configuration, keys, values), **overrides}, device=device)
        memory.load_state_dict(state)
        return memory

    def __getstate__(self) -> dict[str, Any]:
        if self._ranks is not None:
            raise TypeError("a sharded memory must be copied by its state_dict, got a copy that has no process group")
        fields = {name: value for name, value in self.__dict__.items() if name not in ("_ring", "_rows", "watch")}
        return {"fields": fields, "device": self.device, "state": None if self._ring is None else self.state_dict()}

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        self.grows = False  # of a pickle that does not say so
        self.__dict__.update(pickled["fields"])
        self.made_in = running_backward()
        self.watch = Watch()
        self._forget_storage()
        if pickled["state"] is not None:
            self._prepare(pickled["state"]["keys"].device, 0)  # where `map_location` put them
            self.load_state_dict(pickled["state"])
