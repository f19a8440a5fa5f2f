"""The host counts: a backward after more than `spare` new entries is an error, never a wrong gradient."""

from __future__ import annotations

import pytest
import torch
from helpers.recomputation import in_backward
from torch import Tensor

from memtrans_kernels import (
    Ledger,
    StaleMemoryError,
    knn_add_,
    knn_search,
    ledger_advance_,
    ledger_ticket,
    memory_attention,
)
from memtrans_kernels.ledger import check_not_stale


def counts(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def test_a_ticket_is_a_copy_of_the_counts_in_scope() -> None:
    written = counts(5, 6, 7)
    ticket = ledger_ticket(written, [2, 0])
    written += 1
    assert ticket[[0, 2]].tolist() == [5, 7]
    check_not_stale(written, ticket, spare=1)


def test_exactly_spare_new_entries_are_fine_and_one_more_is_an_error_that_names_spare() -> None:
    written = counts(0, 0)
    ticket = ledger_ticket(written, [0, 1])
    after = ledger_advance_(written, ticket, 4)
    check_not_stale(written, ticket, spare=4)
    ledger_advance_(written, after, 1)
    with pytest.raises(StaleMemoryError, match=r"^spare=4 .* comes after 5: .* spare=5 or more"):
        check_not_stale(written, ticket, spare=4)


def test_rows_count_for_themselves() -> None:
    written = counts(0, 0, 0)
    first, second = ledger_ticket(written, [0, 1]), ledger_ticket(written, [2])
    ledger_advance_(written, first, 3)
    assert written.tolist() == [3, 3, 0]
    check_not_stale(written, second, spare=0)
    with pytest.raises(StaleMemoryError):
        check_not_stale(written, first, spare=2)


def test_one_row_that_came_too_far_is_enough() -> None:
    written = counts(0, 0)
    both = ledger_ticket(written, [0, 1])
    ledger_advance_(written, ledger_ticket(written, [1]), 3)
    with pytest.raises(StaleMemoryError, match="comes after 3"):
        check_not_stale(written, both, spare=2)


def test_the_same_segment_noted_twice_counts_once() -> None:
    """Activation checkpointing runs the forward again before the backward."""
    written = counts(10)
    ticket = ledger_ticket(written, [0])
    first = ledger_advance_(written, ticket, 4)
    assert torch.equal(in_backward(lambda: ledger_advance_(written, ticket, 4)), first)
    assert written.tolist() == [14]


def test_noting_an_older_segment_again_forgets_nothing_newer() -> None:
    written = counts(0)
    ticket = ledger_ticket(written, [0])
    ledger_advance_(written, ledger_advance_(written, ticket, 4), 4)
    in_backward(lambda: ledger_advance_(written, ticket, 4))
    assert written.tolist() == [8]


def test_a_ticket_is_spent_by_the_first_segment() -> None:
    written = counts(0, 0)
    both, second = ledger_ticket(written, [0, 1]), ledger_ticket(written, [1])
    ledger_advance_(written, both, 4)
    for ticket in (both, second):
        with pytest.raises(StaleMemoryError, match=r"one segment alone, .* although 4 were added since"):
            ledger_advance_(written, ticket, 4)
    assert written.tolist() == [4, 4]


def test_without_a_ledger_nothing_is_checked() -> None:
    check_not_stale(None, None, spare=0)


class Step:
    """One attention over a ring of M = 3 visible and S = 2 spare slots that is full and wrapped."""

    capacity, spare = 3, 2

    def __init__(self) -> None:
        self.keys, self.values = torch.zeros(2, 1, 5, 4, dtype=torch.float64)
        self.cursor, self.start, self.rows = counts(0), counts(0), counts(0)
        self.written = counts(0)
        self.add(7)

    def add(self, length: int) -> None:
        new = torch.randn(1, 1, length, 4, dtype=torch.float64)
        ticket = ledger_ticket(self.written, [0])
        knn_add_(self.keys, self.values, self.cursor, self.rows, new, -new)
        ledger_advance_(self.written, ticket, length)

    def attend(self) -> tuple[Tensor, Tensor]:
        """The query and the result. The ring is read through tensors of their own, as a memory does it."""
        query = torch.randn(1, 2, 2, 4, dtype=torch.float64, requires_grad=True)
        local = torch.randn(1, 1, 2, 4, dtype=torch.float64)
        keys, values = (torch.from_dlpack(ring) for ring in (self.keys, self.values))
        scores, slots = knn_search(query, keys, self.rows, self.start, self.cursor, self.capacity, 3)
        ledger = Ledger(torch.from_dlpack(self.written), ledger_ticket(self.written, [0]), self.spare)
        scale = torch.ones(2, dtype=torch.float64)
        out, _ = memory_attention(query, local, local, keys, values, self.rows, scores, slots, scale, ledger=ledger)
        return query, out


@pytest.mark.parametrize("segments", [[], [1], [2], [1, 1]])
def test_a_backward_within_spare_gives_the_gradient_of_an_early_one(segments: list[int]) -> None:
    gradients = []
    for added in ([], segments):
        torch.manual_seed(0)
        step = Step()
        query, out = step.attend()
        for length in added:
            step.add(length)
        out.sum().backward()
        gradients.append(query.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("segments", [[3], [2, 1], [1, 1, 1], [20]])
def test_a_backward_after_more_than_spare_raises_and_leaves_no_gradient(segments: list[int]) -> None:
    step = Step()
    query, out = step.attend()
    for length in segments:
        step.add(length)
    with pytest.raises(StaleMemoryError, match=f"spare=2 .* comes after {sum(segments)}"):
        out.sum().backward()
    assert query.grad is None
