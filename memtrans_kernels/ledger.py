"""Counts on the host what each memory row was given, so that a backward pass that comes too late is an error.

A ring of M + S slots keeps an entry readable until S more were added (M visible, S spare). Attention's backward reads
the rows that its forward retrieved, after the same step added new entries; whether they are still there is a question
of counting. The counts live in a small CPU tensor, never on the GPU, so that asking costs no host round trip; they
travel through custom operators, so that a compiled graph counts like an eager one.

    written (R,)  int64, CPU   entries ever given to each row (an upper bound where `count` stored fewer)
    ticket  (R,)  int64, CPU   `written` when a forward pass took its snapshot; OUT_OF_SCOPE for rows it does not read
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memtrans_kernels.eager import is_plain

OUT_OF_SCOPE = torch.iinfo(torch.int64).max // 2


class StaleMemoryError(RuntimeError):
    """A backward pass came after more than `spare` new entries: the rows that it must read may be overwritten.

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

    Noting the same twice (activation checkpointing recomputes the forward) counts once.

    >>> written = torch.tensor([5, 6])
    >>> ticket = ledger_ticket(written, [0, 1])
    >>> ledger_advance_(written, ticket, 4), ledger_advance_(written, ticket, 4)
    (tensor([ 9, 10]), tensor([ 9, 10]))
    >>> written
    tensor([ 9, 10])
    """
    if is_plain(written, ticket):
        return _advance_(written, ticket, length)
    return _ledger_advance_(written, ticket, length)


def _ticket(written: Tensor, rows: Sequence[int]) -> Tensor:
    ticket = torch.full_like(written, OUT_OF_SCOPE)
    index = torch.tensor(rows, dtype=torch.int64, device=written.device)
    ticket[index] = written[index]
    return ticket


def _advance_(written: Tensor, ticket: Tensor, length: int) -> Tensor:
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


def check_not_stale(written: Tensor | None, ticket: Tensor | None, spare: int) -> None:
    """Raises StaleMemoryError when a row of `ticket` was given more than `spare` entries since."""
    if written is None or ticket is None:
        return
    added = int((written - ticket).max())
    if added > spare:
        raise StaleMemoryError(
            f"spare={spare} slots keep what a forward pass retrieved until {spare} more entries were added, but this "
            f"backward pass comes after {added}: create the memory with spare={added} or more, or call backward earlier"
        )
