"""One memory per memorizing layer, and what is said to all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from memtrans.compatibility import UNUSED, warn_unused
from memtrans.memory.announcement import made_together
from memtrans.memory.checks import are_several
from memtrans.memory.files import check_configuration, check_layers, of_class_alone
from memtrans.memory.knn_memory import KNNMemory
from memtrans.memory.moving import Movable
from memtrans.memory.state import check_mapping, memory_arguments
from memtrans.storage import load_tensors, save_tensors
from memtrans_kernels import checks

if TYPE_CHECKING:
    from memtrans.inspection.trace import Trace

KIND = "memtrans.KNNMemoryList"
MemoryType = TypeVar("MemoryType", bound="KNNMemoryList")


class KNNMemoryList(list[KNNMemory], Movable):
    """One `KNNMemory` per memorizing layer; clearing, scoping and saving speak of all of them.

    >>> memories = KNNMemoryList.create_memories(batch_size=2, num_memory_layers=3)(dim=8, max_memories=16)
    >>> len(memories), memories[0].num_indices
    (3, 2)
    """

    @classmethod
    def create_memories(
        cls: type[MemoryType], *, batch_size: int, num_memory_layers: int, memories_directory: Any = UNUSED
    ) -> Callable[..., MemoryType]:
        """Returns a function that takes `KNNMemory`'s arguments and makes `num_memory_layers` memories.

        memories_directory: accepted and ignored, with a DeprecationWarning.
        """
        warn_unused(memories_directory=memories_directory)
        num_memory_layers = checks.integer("num_memory_layers", num_memory_layers, low=0)

        def create(
            *args: Any, memmap_filename: Any = UNUSED, multiprocessing: Any = UNUSED, **kwargs: Any
        ) -> MemoryType:
            warn_unused(memmap_filename=memmap_filename, multiprocessing=multiprocessing)  # once, not for each layer
            arguments = {**kwargs, "num_indices": batch_size}
            with made_together(num_memory_layers):
                return cls([KNNMemory(*args, **arguments) for _ in range(num_memory_layers)])

        return create

    @contextmanager
    def at_batch_indices(self, indices: Iterable[int]) -> Iterator[KNNMemoryList]:
        """Scopes every memory to some documents inside a `with`."""
        indices = _to_go_through_again(indices)
        with ExitStack() as stack:
            for memory in self:
                stack.enter_context(memory.at_batch_indices(indices))
            yield self

    @contextmanager
    def tracing(self, *, local: bool = False) -> Iterator[Trace]:
        """Inside a `with`, notes for each query, layer and head which entries were found and what weight they had.

        A graph's inside cannot be watched: `generate` captures none meanwhile; a captured step, and a model compiled
        with fullgraph=True, raise RuntimeError.

        Rows and queries are those that were given, whatever became of their padding. All ranks of a sharded memory
        trace together: with keep_ids they ask each other where an entry's token stood.

        local: also keep the weights of the local keys, (B, H, N, L) for each pass.

        Yields a trace, which `memtrans.inspection.trace.Trace` describes. Raises ValueError inside another `tracing`.

        >>> memories = KNNMemoryList.create_memories(batch_size=1, num_memory_layers=2)(dim=8, max_memories=16)
        >>> with memories.tracing() as trace:
        ...     pass  # model(tokens, memories), generate(model, prompt, memories=memories)
        >>> trace.layers
        [0, 1]
        """
        # A room above this one: what is made of the notes is none of a memory's business.
        trace = import_module("memtrans.inspection.trace").Trace()
        with ExitStack() as stack:
            for layer, memory in enumerate(self):
                stack.enter_context(memory.watch.by(trace.watcher(layer), local))
            yield trace

    def expand(self: MemoryType, rows: int | Iterable[int]) -> MemoryType:
        """Views of all memories for many questions; see `KNNMemory.expand`.

        >>> memories = KNNMemoryList.create_memories(batch_size=1, num_memory_layers=2)(dim=8, max_memories=16)
        >>> [view.num_indices for view in memories.expand(4)]
        [4, 4]
        """
        rows = _to_go_through_again(rows)
        return type(self)(memory.expand(rows) for memory in self)

    def to(self: MemoryType, *args: Any, **kwargs: Any) -> MemoryType:
        """Moves or casts all memories in place; returns the list. See `KNNMemory.to`."""
        for memory in self:
            memory.to(*args, **kwargs)
        return self

    def clear_memory(
        self, batch_indices: int | Iterable[int] | None = None, memory_indices: Iterable[int] | None = None
    ) -> None:
        """Forgets documents (all by default), counted absolutely, in the memories named (all by default).

        A row begins anew when one of its memories forgets it: XL caches of before are out of sight for it in all
        layers, while the memories that are not named still answer. See `KNNMemory.clear`.

        Raises IndexError or TypeError when there is no such memory; see `KNNMemory.clear` for documents.
        """
        batch_indices = _to_go_through_again(batch_indices)
        named: Any = range(len(self)) if memory_indices is None else memory_indices
        if not are_several(named):
            raise TypeError(f"memory_indices must be a sequence of numbers of memories, got {named!r}")
        chosen = [checks.integer("memory_indices", index) for index in named]
        if not all(-len(self) <= index < len(self) for index in chosen):
            raise IndexError(f"memory_indices must be in [0, {len(self)}), got {chosen}")
        for index in chosen:
            self[index].clear(batch_indices)

    def clear_rows(self, mask: Tensor) -> None:
        """Forgets the documents in scope where mask (B,) bool, on the device, is True; see `KNNMemory.clear_rows`."""
        for memory in self:
            memory.clear_rows(mask)

    def cleanup(self) -> None:
        """Changes nothing; see `KNNMemory.cleanup`."""

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of what the memories hold, names prefixed by the layer's place in the list."""
        return {
            f"{index}.{name}": tensor
            for index, memory in enumerate(self)
            for name, tensor in memory.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replaces what the memories hold.

        Raises TypeError when the state is no mapping, ValueError when it is of another number of layers or shape.
        """
        check_mapping(state)
        layers = {name.partition(".")[0] for name in state}
        if layers != {str(index) for index in range(len(self))}:
            raise ValueError(f"state must hold memories 0 to {len(self) - 1}, got {sorted(layers)}")
        parts: list[dict[str, Tensor]] = [{} for _ in self]
        for name, tensor in state.items():
            index, _, field = name.partition(".")
            parts[int(index)][field] = tensor
        for memory, part in zip(self, parts, strict=True):
            memory.check_state(part)  # all of them before the first is replaced
        for memory, part in zip(self, parts, strict=True):
            memory.load_state_dict(part)

    def save(self, path: str | Path) -> None:
        """Writes all memories as one safetensors file, atomically; directories that are missing are made.

        Raises ValueError when there is none, or they differ in more than what they hold.
        """
        configurations = [memory.configuration() for memory in self]
        if not configurations or configurations != [configurations[0]] * len(self):
            raise ValueError(f"the list must hold memories of one configuration to be saved, got {configurations}")
        save_tensors(path, self.state_dict(), KIND, {"layers": len(self), **configurations[0]})

    @of_class_alone
    @classmethod
    def load(
        cls: type[MemoryType], path: str | Path, *, device: torch.device | str | None = None, **overrides: Any
    ) -> MemoryType:
        """Reads memories that `save` wrote; arguments of `KNNMemory` override what the file says.

        A smaller `max_memories` keeps the newest entries, a larger one makes room. See `KNNMemory.load` for `device`
        and dtypes.

        Raises ValueError when the file is damaged or holds something else, FileNotFoundError when there is none.
        TypeError when called on an instance, whose own entries `load_state_dict` replaces.
        """
        state, configuration = load_tensors(path, KIND)
        layers = check_layers(configuration.pop("layers", None), state)
        check_configuration(configuration, state["0.keys"])
        arguments = {**memory_arguments(configuration, state["0.keys"], state["0.values"]), **overrides}
        with made_together(layers):
            memories = cls([KNNMemory(**arguments, device=device) for _ in range(layers)])
        memories.load_state_dict(state)
        return memories


def _to_go_through_again(numbers: Any) -> Any:
    """The same numbers for every memory: a generator would have none left for the second one."""
    return list(numbers) if isinstance(numbers, Iterator) else numbers
