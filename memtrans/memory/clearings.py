"""How often each row of a memory was cleared, by which an XL cache tells whether its row's document is over.

Clearing says that another document begins. What a cache holds of the one before lies outside the memory, so nothing can
be taken from it: the cache remembers the counts as they stood when it was made, and a segment that is given both leaves
out the rows whose counts went on. Of several memories one is enough: a row begins anew when one of them forgets it.

Shapes: B documents, G key/value heads, R = B·G memory rows, X cached XL tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memtrans.xl_memories import CLEARINGS, clearings_said, is_silent, longest_of
from memtrans_kernels import read_cursors

if TYPE_CHECKING:
    from memtrans.memory.snapshot import MemorySnapshot


class Clearings:
    """The counts of a ring's rows.

    Attributes:
        count: (R,) int64 on the device.
        unread: whether rows were cleared since the memory was last given a segment, as far as the host knows.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.count = torch.zeros(rows, dtype=torch.int64, device=device)
        self.unread = self._read = False
        self._copy, self._version = self.count, self.count._version - 1

    @property
    def any(self) -> bool:
        """Whether a row may have been cleared; asks the host alone."""
        return self.count._version > 0

    def as_they_stand(self) -> Tensor:
        """A copy of the counts (R,), the same tensor until a row is cleared; in a graph it is read anew each time."""
        if torch.compiler.is_compiling():
            return read_cursors(self.count, self.count)[0]
        if self.count.is_cuda and torch.cuda.is_current_stream_capturing():
            return self.count.clone()
        if self._version != self.count._version:
            self._copy, self._version = self.count.clone(), self.count._version
        return self._copy

    def go_on(self, counts: Tensor) -> None:
        """Rows were cleared: takes up the counts (R,) after it; a recomputed forward clears nothing newer."""
        self.count.copy_(torch.maximum(self.count, counts))
        if not torch.compiler.is_compiling():
            self.unread = self._read

    def take_up(self, counts: Tensor | None) -> None:
        """The memory holds what another one did, whose counts (R,) are taken up, where it was cleared; for all that is
        known, a segment was given to that one."""
        self._read = True
        if counts is not None:
            self.go_on(counts)

    def know_as(self, other: Clearings) -> None:
        """The memory is the one of `other`, in another storage."""
        self.unread, self._read = other.unread, other._read

    def note_segment(self) -> None:
        """The memory is given a segment, which may leave nothing in it."""
        if not torch.compiler.is_compiling():
            self.unread, self._read = False, True


def cleared_since(caches: Sequence[Tensor | None], snapshots: Sequence[MemorySnapshot]) -> Tensor | None:
    """Which rows (B,) bool one of the memories forgot since the XL caches were made; None where the host knows of none.

    Of caches that were made without these memories nothing is known.
    """
    rows = [
        snapshot.cleared_since(counts)
        for counts, snapshot in zip(clearings_said(caches), snapshots, strict=False)
        if counts.shape == snapshot.clearings.shape
        and (torch.compiler.is_compiling() or counts is not snapshot.clearings)
    ]
    return torch.stack(rows).any(dim=0) if rows else None


def length_seen(
    caches: Sequence[Tensor | None], xl_length: Tensor | None, snapshots: Sequence[MemorySnapshot]
) -> Tensor | None:
    """`xl_length` (B,), but 0 for rows that one of the memories forgot since the caches were made; None for all."""
    cleared = cleared_since(caches, snapshots)
    if cleared is None:
        return xl_length
    return torch.where(cleared, 0, longest_of(caches) if xl_length is None else xl_length)


def remember(cache: Tensor, snapshots: Sequence[MemorySnapshot]) -> None:
    """Lets an XL cache know how often the rows of the memories that it was made with were cleared."""
    setattr(cache, CLEARINGS, tuple(snapshot.clearings for snapshot in snapshots))


def check_known(caches: Sequence[Tensor | None], xl_length: Tensor | None, snapshots: Sequence[MemorySnapshot]) -> None:
    """Raises ValueError where nobody says whether the caches are older than what the memories forgot."""
    if xl_length is None and is_silent(caches) and _any_unread(snapshots):
        raise ValueError(
            "xl_length must be given with xl_memories that do not say which document they are of, beside memories that "
            "were cleared since their last segment: 0 for rows that begin anew"
        )


def check_cache_known(cache: Tensor, local_length: Tensor | None, snapshots: Sequence[MemorySnapshot]) -> None:
    """`check_known`, for a layer that is called without a model."""
    silent = cache.shape[-3] > 0 and not hasattr(cache, CLEARINGS)
    if local_length is None and silent and _any_unread(snapshots):
        raise ValueError(
            "local_length must be given with an xl_memory that does not say which document it is of, beside a memory "
            "that was cleared since its last segment: N for rows that begin anew"
        )


def _any_unread(snapshots: Sequence[MemorySnapshot]) -> bool:
    return any(snapshot.ring.clearings.unread for snapshot in snapshots)
