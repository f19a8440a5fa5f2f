"""A snapshot of a memory: what one forward pass sees and stores, however often it runs and whatever comes between."""

from __future__ import annotations

import pytest
import torch
from helpers.memories import filled, held, pairs
from helpers.recomputation import in_backward
from torch import Tensor

from memtrans import KNNMemory
from memtrans.memory.snapshot import MemorySnapshot
from memtrans_kernels import StaleMemoryError


def segment(*numbers: float, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Keys and values (B, 1, N, D)."""
    both = pairs(*numbers, batch=batch)[:, None]
    return both[..., 0, :], both[..., 1, :]


def seen(snapshot: MemorySnapshot, topk: int = 9) -> list[list[float]]:
    """The values that each document shows to a search through the snapshot, old to new."""
    query = torch.ones(snapshot.documents, 1, 1, 2)
    _, slots = snapshot.nearest(query, topk)
    return [
        [snapshot.values[row, slot, 0].item() for slot in found if slot >= 0]
        for row, found in zip(snapshot.rows.tolist(), slots[:, 0, 0].tolist(), strict=True)
    ]


def test_a_snapshot_sees_nothing_that_is_added_or_cleared_later() -> None:
    memory = filled(spare=4)
    snapshot = memory.snapshot()
    memory.add(pairs(4, 5, batch=2))
    memory.clear([0])
    assert seen(snapshot) == [[1, 2, 3], [1, 2, 3]]
    assert held(memory) == [[], [2, 3, 4, 5]]


def test_appending_again_in_a_backward_pass_stores_once_and_gives_the_same_state() -> None:
    memory = filled(spare=4)
    snapshot = memory.snapshot()
    after = [snapshot.append(*segment(4, 5)), in_backward(lambda: snapshot.append(*segment(4, 5)))]
    assert held(memory) == [[2, 3, 4, 5]] * 2
    assert [seen(state) for state in after] == [[[2, 3, 4, 5]] * 2] * 2
    assert torch.equal(after[0].ticket, after[1].ticket)


def test_appending_again_in_a_backward_pass_writes_over_nothing_newer() -> None:
    memory = filled(spare=4)
    snapshot = memory.snapshot()
    for numbers in ((4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)):
        memory.snapshot().append(*segment(*numbers))
    in_backward(lambda: snapshot.append(*segment(4, 5, 6, 7)))
    assert held(memory) == [[12, 13, 14, 15]] * 2


def test_21_7_one_snapshot_for_several_segments_is_refused_before_anything_is_lost() -> None:
    memory = filled(spare=4)
    snapshot, other = memory.snapshot(), memory.snapshot()
    snapshot.append(*segment(4))
    for spent in (snapshot, other):
        with pytest.raises(StaleMemoryError, match="a snapshot must be given to one segment alone"):
            spent.append(*segment(5))
    assert held(memory) == [[1, 2, 3, 4]] * 2


@pytest.mark.parametrize("grown", [False, True])
def test_21_7_a_snapshot_searched_after_more_than_spare_entries_is_refused(grown: bool) -> None:
    """Unless the ring was laid out anew: then its storage stays as it was."""
    memory = filled(spare=3)
    snapshot = memory.snapshot()
    if grown:
        memory.snapshot(like=torch.ones(1), longest=9)
    memory.add(pairs(4, 5, 6, batch=2))
    assert seen(snapshot) == [[1, 2, 3]] * 2
    memory.add(pairs(7, batch=2))
    if grown:
        assert seen(snapshot) == [[1, 2, 3]] * 2
        return
    for search in (snapshot.nearest, snapshot.pairs, snapshot.attend_to_retrieved):
        with pytest.raises(StaleMemoryError, match=r"^spare=3 .* this search comes after 4: .* spare=4 or more"):
            search(torch.ones(2, 1, 1, 2), 1, *([torch.ones(1)] if search == snapshot.attend_to_retrieved else []))


def test_a_count_stores_the_first_so_many_of_each_document() -> None:
    memory = filled()
    after = memory.snapshot().append(*segment(4, 5), torch.tensor([0, 1]))
    assert held(memory) == seen(after) == [[1, 2, 3], [1, 2, 3, 4]]


def test_clearing_again_through_an_old_snapshot_forgets_nothing_newer() -> None:
    """A recomputed forward clears at the same place as the first time."""
    memory = filled(spare=4)
    snapshot, mask = memory.snapshot(), torch.tensor([True, False])
    after = snapshot.clear_rows(mask)
    assert seen(after) == [[], [1, 2, 3]]
    after.append(*segment(4))
    memory.clear([1])
    snapshot.clear_rows(mask)
    assert held(memory) == [[4], []]


def test_a_snapshot_of_a_scope_speaks_of_its_documents_alone() -> None:
    memory = filled(3)
    with memory.at_batch_indices([2]):
        snapshot = memory.snapshot()
    assert seen(snapshot.append(*segment(4, batch=1))) == [[1, 2, 3, 4]]
    assert held(memory) == [[1, 2, 3], [1, 2, 3], [1, 2, 3, 4]]


def test_a_snapshot_outlives_a_ring_that_is_laid_out_again() -> None:
    """It still finds all that it saw; what is appended through it goes into the new ring, as the state after sees."""
    memory = KNNMemory(2, 4, 2)
    memory.add(pairs(1, 2, 3, batch=2))
    snapshot = memory.snapshot()
    with memory.at_batch_indices([0]):
        memory.add(pairs(*range(10, 30)))
    assert seen(snapshot) == [[1, 2, 3], [1, 2, 3]]
    with memory.at_batch_indices([1]):
        before = memory.snapshot()
        memory.snapshot(like=torch.ones(1), longest=100)
        assert seen(before.append(*segment(4, batch=1))) == [[1, 2, 3, 4]]
    assert held(memory) == [[26, 27, 28, 29], [1, 2, 3, 4]]
