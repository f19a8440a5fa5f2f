"""What a memory's contexts ask of the passes inside them: `off`, `writing`, `expand`, `newest` and the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from memtrans.hf.entries import Entries
from memtrans.hf.state import Watched
from memtrans.hf.views import part_of, repeated
from memtrans.memory.snapshot import MemorySnapshot


@dataclass(eq=False)
class Scope:
    """What a memory is inside of; the defaults are what it is outside of every context.

    Attributes:
        is_off: whether passes are those of the model without a memory.
        is_writing: whether passes add what they saw. searches: whether they look at what is held.
        splits: whether passes in `eval()` mode have entries of their own.
        as_they_are: whether a memory that is laid out holds values as they are, for a calibration; see `Entries`.
        questions: how many rows of a pass stand behind each document.
        newest: how many entries of each document a pass sees; 0 for all. behind: how many that came last it does not.
        watched: who watches passes, without the ids of what is held; None for nobody.

    >>> scope = Scope()
    >>> with scope.within(is_writing=True), scope.within(is_off=True):
    ...     scope.is_writing, scope.is_off
    (True, True)
    >>> scope.is_writing, scope.is_off
    (False, False)
    """

    is_off: bool = False
    is_writing: bool = False
    searches: bool = True
    splits: bool = False
    as_they_are: bool = False
    questions: int = 1
    newest: int | Tensor = 0
    behind: int | Tensor = 0
    watched: Watched | None = None

    @contextmanager
    def within(self, **asked: Any) -> Iterator[None]:
        """Inside, these attributes are as asked; afterwards these, and no others, are what they were."""
        before = {name: getattr(self, name) for name in asked}
        self.__dict__.update(asked)
        try:
            yield
        finally:
            self.__dict__.update(before)

    def views(self, snapshots: Mapping[int, MemorySnapshot]) -> dict[int, MemorySnapshot]:
        """Every layer's memory as a pass sees it: rows repeated by `expand`, and no more entries than `newest`."""
        return {number: self._view(snapshot) for number, snapshot in snapshots.items()}

    def _view(self, snapshot: MemorySnapshot) -> MemorySnapshot:
        if isinstance(self.newest, Tensor) or self.newest:
            snapshot = part_of(snapshot, self.newest, self.behind)
        return repeated(snapshot, self.questions) if self.questions > 1 else snapshot

    def watched_at(self, entries: Entries) -> Watched | None:
        """Who watches a pass that looks at these entries; None for nobody."""
        if self.watched is None:
            return None
        return replace(self.watched, ids=None if entries.ids is None else entries.ids.snapshot())
