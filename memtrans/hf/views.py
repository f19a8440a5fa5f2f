"""A memory as a pass sees it that is not to see all of it, or not as it stands."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from memtrans.memory.snapshot import MemorySnapshot


def repeated(view: MemorySnapshot, times: int) -> MemorySnapshot:
    """Each document's rows so many times, one after the other."""
    rows = view.rows.reshape(view.documents, 1, -1).expand(-1, times, -1).flatten()
    return replace(view, rows=rows, documents=view.documents * times, in_order=False)


def part_of(view: MemorySnapshot, newest: int | Tensor, behind: int | Tensor) -> MemorySnapshot:
    """The same, before the last `behind` entries of each row were added, and of what is left only the newest."""
    cursor = torch.maximum(view.start, view.cursor - behind)
    return replace(view, cursor=cursor, start=torch.maximum(view.start, cursor - newest))
