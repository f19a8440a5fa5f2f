"""One filled memory for many questions: its documents, each under as many rows as are asked for, to read alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from memtrans.memory.checks import are_several
from memtrans.memory.knn_memory import KNNMemory
from memtrans_kernels import checks

if TYPE_CHECKING:
    from memtrans.memory.ring import Ring
    from memtrans.memory.snapshot import MemorySnapshot


def _refused(name: str) -> Callable[..., NoReturn]:
    def refuse(self: Any, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            f"{name} must be called on the memory itself, got a view of it that `expand` made, to read alone"
        )

    refuse.__name__ = name
    refuse.__doc__ = "Raises TypeError: a view is to read alone."
    return refuse


class ExpandedMemory(KNNMemory):
    """A view of a memory for other rows; `KNNMemory.expand` makes it. It sees what is added to the memory later.

    Args:
        memory: what it is a view of.
        documents: for each row the document that it reads, counted absolutely.
    """

    def __init__(self, memory: KNNMemory, documents: Sequence[int]) -> None:
        self.memory, self.documents = memory, list(documents)
        self.num_indices = len(self.documents)
        self.scoped_indices = list(range(self.num_indices))
        self.shape = (self.num_indices, *memory.shape[1:])
        self.made_in = memory.made_in
        self._rows = None

    def __getattr__(self, name: str) -> Any:
        """What the view has not of its own is the memory's."""
        if name in ("memory", "_rows"):  # of a view that is being made
            raise AttributeError(name)
        return getattr(self.memory, name)

    @property
    def _ring(self) -> Ring | None:  # type: ignore[override]
        return self.memory._ring

    @property
    def lengths(self) -> Tensor:
        """How many entries the document of each row holds (rows,)."""
        lengths = self.memory.lengths
        return lengths[torch.tensor(self.documents, device=lengths.device)]

    def _host_rows(self) -> list[int]:
        documents = [self.documents[row] for row in self.scoped_indices]
        return [document * self.kv_heads + group for document in documents for group in range(self.kv_heads)]

    def as_it_stands(self, device: torch.device | None, longest: int) -> MemorySnapshot:
        """See `KNNMemory`; nothing is added, so the ring need not have room for `longest` entries."""
        if self._ring is None and device is not None:
            self.memory._prepare(device, 0)
        if self._ring is not None and (self._rows is None or self._rows.device != self._ring.keys.device):
            self._rows = self._scoped_rows()
        return super().as_it_stands(device, 0).to_read()

    def _prepare(self, device: torch.device, longest: int) -> None:
        """Leaves the ring as it is."""

    remove = _refused("remove")
    clear = _refused("clear")
    load_state_dict = _refused("load_state_dict")
    state_dict = _refused("state_dict")
    save = _refused("save")
    to = _refused("to")
    __getstate__ = _refused("__getstate__")


def documents_of_rows(rows: int | Iterable[int], scope: Sequence[int]) -> list[int]:
    """The document of each row: of a number of rows, neighbouring rows have the same one.

    Raises ValueError or TypeError for a number that is no multiple of the documents in scope, or documents out of it.

    >>> documents_of_rows(4, [0, 2]), documents_of_rows([1, 0, 1], [0, 2])
    ([0, 0, 2, 2], [2, 0, 2])
    """
    if are_several(rows):
        places = [checks.integer("rows", place) for place in rows]
        if not places or not all(0 <= place < len(scope) for place in places):
            raise ValueError(f"rows must be numbers of the documents in scope, in [0, {len(scope)}), got {places}")
        return [scope[place] for place in places]
    number = checks.integer("rows", rows, low=1)
    if number % len(scope):
        raise ValueError(
            f"rows must be a multiple of the {len(scope)} documents in scope, or the document of each row, got {number}"
        )
    return [document for document in scope for _ in range(number // len(scope))]
