"""A batch's rows in a checkpoint: a run may go on with another number of ranks than wrote it.

Each rank of the saved run wrote the memories and XL caches of the rows that it owned. A rank of the resumed run picks
its own rows out of those parts and puts them together.

Shapes: B rows that are saved together, G key/value heads, entries: of the longest row, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from memtrans.distributed.ranks import Ranks
from memtrans.training.checkpoint import Parts, part_name

ROW_PARTS = ("memories", "xl")  # the parts of which each rank saves its own rows

State = Mapping[str, Tensor]


def overlapping(rows: range, batch: int, saved_by: int) -> list[int]:
    """The ranks of a saved run that owned some of these rows.

    >>> overlapping(range(2, 6), batch=8, saved_by=4)
    [1, 2]
    """
    return [rank for rank in range(saved_by) if owns_some(rows, batch, saved_by, rank)]


def owns_some(rows: range, batch: int, saved_by: int, rank: int) -> bool:
    """Whether a rank of a saved run owned some of these rows."""
    return rank < saved_by and len(_common(rows, Ranks(rank, saved_by).rows(batch))) > 0


def _common(rows: range, others: range) -> range:
    return range(max(rows.start, others.start), min(rows.stop, others.stop))


def parts_of_rows(parts: Parts, rows: range, batch: int, saved_by: int) -> dict[str, State]:
    """The parts `memories` and `xl` of these rows, out of the parts of `saved_by` ranks.

    Raises KeyError when a part is missing.
    """
    owners = overlapping(rows, batch, saved_by)
    taken: dict[str, list[State]] = {part: [] for part in ROW_PARTS}
    for rank in owners:
        owned = Ranks(rank, saved_by).rows(batch)
        here = _common(rows, owned)
        for part in ROW_PARTS:
            state = parts[part_name(part, rank)]
            taken[part].append(_some(state, here.start - owned.start, here.stop - owned.start, len(owned)))
    return {part: _joined(states) for part, states in taken.items()}


def _some(state: State, first: int, last: int, batch: int) -> State:
    """Rows first to last; a tensor has one row for each row of the batch, or one for each of its G heads (B.G)."""
    some = {}
    for name, tensor in state.items():
        heads = tensor.shape[0] // batch
        some[name] = tensor[first * heads : last * heads]
    return some


def _joined(states: Sequence[State]) -> State:
    """The rows of several states below one another."""
    if len(states) == 1:
        return states[0]
    return {name: torch.cat(_of_one_length([state[name] for state in states])) for name in states[0]}


def _of_one_length(tensors: list[Tensor]) -> list[Tensor]:
    """Of a memory's keys and values (R, entries, D), which end with the newest entry, the shorter begin with zeros."""
    if tensors[0].dim() != 3:
        return tensors
    longest = max(tensor.shape[1] for tensor in tensors)
    return [F.pad(tensor, (0, 0, longest - tensor.shape[1], 0)) for tensor in tensors]
