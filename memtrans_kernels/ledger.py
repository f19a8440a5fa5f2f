"""Counts on the host what each memory row was given, so that a backward pass that comes too late is an error.

A ring of M + S slots keeps an entry readable until S more were added (M visible, S spare). Attention's backward reads
the rows that its forward retrieved, after the same step added new entries; whether they are still there is a question
of counting. The counts live in a small CPU tensor, never on the GPU, so that asking costs no host round trip; they
travel through custom operators, so that a compiled graph counts like an eager one.

What a backward pass will still read is known by its ticket, which autograd saves with it: weak references to such
tickets say how many spare slots are enough.

    written (R,)  int64, CPU   entries ever given to each row (an upper bound where `count` stored fewer)
    ticket  (R,)  int64, CPU   `written` when a forward pass took its snapshot; OUT_OF_SCOPE for rows it does not read
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memtrans_kernels.eager import is_plain

OUT_OF_SCOPE = torch.iinfo(torch.int64).max // 2

# By the address of `written`: the tickets of forward passes whose backward may come, by their identity.
_SAVED: dict[int, dict[int, weakref.ref[Tensor]]] = {}


class StaleMemoryError(RuntimeError):
    """A search or a backward pass came after more than `spare` new entries: what it must read may be overwritten.

    Or one snapshot was given to a second segment, whose entries would take the place of the first one's.

    >>> check_not_stale(written=torch.tensor([9]), ticket=torch.tensor([4]), spare=3)
    Traceback (most recent call last):
        ...
    memtrans_kernels.ledger.StaleMemoryError: spare=3 slots keep what a forward pass retrieved until 3 more entries ...
    """


class Ledger(NamedTuple):
    """What `memory_attention` needs to know whether its backward still finds what its forward retrieved.

    Attributes:
        written: (R,) int64, CPU, counted on by `ledger_advance_`. ticket: (R,) int64, CPU, from `ledger_ticket`.
        spare: S.

    >>> written = torch.zeros(1, dtype=torch.int64)
    >>> Ledger(written, ledger_ticket(written, [0]), spare=4).ticket.tolist()
    [0]
    """

    written: Tensor
    ticket: Tensor
    spare: int


# ------------------------------------------------------------------------------------------------ public functions


def read_cursors(start: Tensor, cursor: Tensor) -> tuple[Tensor, Tensor]:
    """Copies both (R,), as an operator of its own: a compiler that recomputes activations must not read them later.

    >>> start, cursor = torch.tensor([0]), torch.tensor([5])
    >>> snapshot = read_cursors(start, cursor)
    >>> _ = cursor.add_(3)
    >>> snapshot
    (tensor([0]), tensor([5]))
    """
    return (start.clone(), cursor.clone()) if is_plain(start, cursor) else _read_cursors(start, cursor)


def ledger_ticket(written: Tensor, rows: Sequence[int]) -> Tensor:
    """Copies the counts of `rows` out of `written` (R,); every other row is out of scope.

    Raises IndexError when there is no such row.

    >>> ledger_ticket(torch.tensor([5, 6]), [1]).tolist() == [OUT_OF_SCOPE, 6]
    True
    """
    return _ticket(written, rows) if is_plain(written) else _ledger_ticket(written, rows)


def ledger_advance_(written: Tensor, ticket: Tensor, length: int) -> Tensor:
    """Notes in `written` (R,) that the rows of `ticket` were given `length` entries; returns the ticket after them.

    Noting the same again in a backward pass (activation checkpointing recomputes the forward) counts once.

    Raises StaleMemoryError where a row was given entries since the ticket was made, outside of a backward pass: the
    new ones would be written over them.

    >>> written = torch.tensor([5, 6])
    >>> ticket = ledger_ticket(written, [0, 1])
    >>> ledger_advance_(written, ticket, 4), written
    (tensor([ 9, 10]), tensor([ 9, 10]))
    """
    if is_plain(written, ticket):
        return _advance_(written, ticket, length)
    return _ledger_advance_(written, ticket, length)


def _ticket(written: Tensor, rows: Sequence[int]) -> Tensor:
    if list(rows) == list(range(len(written))):
        return written.clone()
    ticket = torch.full_like(written, OUT_OF_SCOPE)
    index = torch.tensor(rows, dtype=torch.int64, device=written.device)
    ticket[index] = written[index]
    return ticket


def stored_since(written: Tensor, ticket: Tensor) -> bool:
    """Whether a row of `ticket` was given entries since: in a backward pass those that it is about to store again."""
    return bool((written > ticket).any())


def _advance_(written: Tensor, ticket: Tensor, length: int) -> Tensor:
    if torch._C._current_graph_task_id() == -1 and stored_since(written, ticket):
        raise StaleMemoryError(
            f"a snapshot must be given to one segment alone, got entries to store behind it although "
            f"{_added(written, ticket)} were added since it was made: take a snapshot for each segment, in its turn"
        )
    in_scope = ticket != OUT_OF_SCOPE
    after = torch.where(in_scope, ticket + length, ticket)
    written.copy_(torch.where(in_scope, torch.maximum(written, after), written))
    return after


# ------------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("memtrans::read_cursors", mutates_args=())
def _read_cursors(start: Tensor, cursor: Tensor) -> tuple[Tensor, Tensor]:
    return start.clone(), cursor.clone()


@_read_cursors.register_fake
def _(start: Tensor, cursor: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(start), torch.empty_like(cursor)


@torch.library.custom_op("memtrans::ledger_ticket", mutates_args=())
def _ledger_ticket(written: Tensor, rows: Sequence[int]) -> Tensor:
    return _ticket(written, rows)


@_ledger_ticket.register_fake
def _(written: Tensor, rows: Sequence[int]) -> Tensor:
    return torch.empty_like(written)


@torch.library.custom_op("memtrans::ledger_advance_", mutates_args=("written",))
def _ledger_advance_(written: Tensor, ticket: Tensor, length: int) -> Tensor:
    return _advance_(written, ticket, length)


@_ledger_advance_.register_fake
def _(written: Tensor, ticket: Tensor, length: int) -> Tensor:
    return torch.empty_like(ticket)


# --------------------------------------------------------------------------------------- what a backward pass may need


def note_saved(written: Tensor | None, ticket: Tensor | None) -> None:
    """Remembers, weakly, that a forward pass saved `ticket` for a backward pass."""
    if type(ticket) is not Tensor or type(written) is not Tensor:
        return  # none, or one that only stands for it while a graph is traced
    place, number = written.data_ptr(), id(ticket)

    def forget(_: weakref.ref[Tensor]) -> None:
        of_place = _SAVED.get(place, {})
        of_place.pop(number, None)
        if not of_place:
            _SAVED.pop(place, None)

    _SAVED.setdefault(place, {})[number] = weakref.ref(ticket, forget)


def to_save(written: Tensor | None, ticket: Tensor | None) -> Tensor | None:
    """The ticket that a forward pass saves for its backward pass: noted, and alive as long as autograd keeps it.

    Under hooks on saved tensors autograd need not keep any (activation checkpointing drops all); what was handed in
    then stands for it, alive as long as the snapshot that a recomputation will need.
    """
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    saved = ticket if hooked or type(ticket) is not Tensor else ticket.detach()
    note_saved(written, saved)
    return saved


def _saved(written: Tensor) -> Iterator[Tensor]:
    for reference in list(_SAVED.get(written.data_ptr(), {}).values()):
        ticket = reference()
        if ticket is not None and ticket.shape == written.shape:
            yield ticket


def _added(written: Tensor, ticket: Tensor) -> int:
    return int((written - ticket).max())


def room_needed(written: Tensor, ticket: Tensor, length: int) -> int:
    """How many spare slots outstanding backward passes need when the rows of `ticket` are given `length` more entries.

    0 where none is outstanding.

    >>> written = torch.tensor([5])
    >>> saved = ledger_ticket(written, [0])
    >>> note_saved(written, saved)
    >>> later = ledger_advance_(written, saved, 4)
    >>> room_needed(written, later, 4)
    8
    """
    after = torch.where(ticket == OUT_OF_SCOPE, written, torch.maximum(written, ticket + length))
    return max((_added(after, saved) for saved in _saved(written)), default=0)


def check_not_stale(written: Tensor | None, ticket: Tensor | None, spare: int) -> None:
    """Raises StaleMemoryError when a row of `ticket` was given more than `spare` entries since."""
    if written is None or ticket is None:
        return
    added = _added(written, ticket)
    if added > spare:
        enough = max([added, *(_added(written, saved) for saved in _saved(written))])
        what = "search" if torch._C._current_graph_task_id() == -1 else "backward pass"
        raise StaleMemoryError(
            f"spare={spare} slots keep what a forward pass retrieved until {spare} more entries were added, but this "
            f"{what} comes after {added}: create the memory with spare={enough} or more, or call it earlier"
        )
