"""Streams of documents: what each row reads, what is scored, where it resumes."""

from __future__ import annotations

import pytest
import torch

from memtrans.data.documents import Document, InOrder, RandomWindows, Shuffled
from memtrans.data.stream import NOT_SCORED, Batch, DocumentStream


def documents_of(*lengths: int) -> list[Document]:
    """Documents whose bytes tell the document and the place apart; byte 0 is among them."""
    return [
        Document.of(str(number), bytes((place + 50 * number) % 256 for place in range(length)))
        for number, length in enumerate(lengths)
    ]


def read(stream: DocumentStream, batches: int) -> list[Batch]:
    found = [stream.next() for _ in range(batches)]
    assert all(batch is not None for batch in found)
    return found


def assert_same(left: Batch, right: Batch) -> None:
    for name in ("tokens", "labels", "lengths", "fresh"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    assert (left.scored, left.real) == (right.scored, right.real)


@pytest.mark.parametrize("length", [2, 3, 8, 9, 10, 17, 25])
@pytest.mark.parametrize("segment", [1, 4, 8])
def test_a_row_reads_every_byte_of_a_document_once_and_is_asked_for_every_next_one(length, segment):
    (document,) = documents_of(length)
    batches = list(DocumentStream(InOrder([document]), batch=1, segment=segment))
    tokens = torch.cat([batch.tokens[0, : batch.lengths[0]] for batch in batches])
    labels = torch.cat([batch.labels[0, : batch.lengths[0]] for batch in batches])
    assert tokens.tolist() == document.content[:-1].tolist()
    assert labels.tolist() == document.content[1:].tolist()
    assert [bool(batch.fresh) for batch in batches] == [True] + [False] * (len(batches) - 1)


def test_the_label_of_a_segments_last_byte_is_the_next_segments_first_byte():
    first, second = read(DocumentStream(InOrder(documents_of(20)), batch=1, segment=8), 2)
    assert first.labels[0, -1] == second.tokens[0, 0]


def test_padding_is_neither_scored_nor_real_and_byte_zero_is_a_byte_like_any_other():
    document = Document.of("zeros", bytes(6))
    first, second = DocumentStream(InOrder([document]), batch=1, segment=4)
    assert first.labels.tolist() == [[0, 0, 0, 0]]
    assert second.labels.tolist() == [[0, NOT_SCORED, NOT_SCORED, NOT_SCORED]]
    assert (second.lengths.tolist(), second.real, second.scored) == ([1], 1, 1)


def test_rows_walk_documents_of_their_own_and_never_share_a_segment_between_two():
    documents = documents_of(30, 5, 11, 40, 2, 23)
    readings: dict[str, list[int]] = {}
    current = [""] * 3
    stream = DocumentStream(InOrder(documents), batch=3, segment=4)
    taken = 0
    for batch in stream:
        for row in range(3):
            if batch.fresh[row]:
                current[row] = documents[taken].name
                taken += 1
            readings.setdefault(current[row], []).extend(batch.tokens[row, : batch.lengths[row]].tolist())
    assert readings == {document.name: document.content[:-1].tolist() for document in documents}


def test_a_row_without_a_document_left_is_all_padding_until_the_others_are_done():
    batches = list(DocumentStream(InOrder(documents_of(3, 12)), batch=2, segment=4))
    assert [batch.lengths.tolist() for batch in batches] == [[2, 4], [0, 4], [0, 3]]
    assert not batches[1].fresh[0]
    assert (batches[1].labels[0] == NOT_SCORED).all()


@pytest.mark.parametrize("steps", [0, 1, 7, 40])
@pytest.mark.parametrize("make", [lambda d: Shuffled(d, seed=3), lambda d: RandomWindows(d, length=11, seed=3)])
def test_a_stream_that_loads_a_position_yields_the_same_batches(make, steps):
    documents = documents_of(30, 5, 11, 40, 2, 23)
    stream = DocumentStream(make(documents), batch=3, segment=4)
    read(stream, steps)
    state = stream.state_dict()
    resumed = DocumentStream(make(documents), batch=3, segment=4)
    resumed.load_state_dict(state)
    for left, right in zip(read(stream, 25), read(resumed, 25), strict=True):
        assert_same(left, right)


def test_a_position_of_another_batch_is_refused():
    state = DocumentStream(InOrder(documents_of(9)), batch=2, segment=4).state_dict()
    with pytest.raises(ValueError, match="state must hold 3 rows, got 2"):
        DocumentStream(InOrder(documents_of(9)), batch=3, segment=4).load_state_dict(state)


def test_shuffled_hands_out_every_document_once_a_round_in_different_orders():
    order = Shuffled(documents_of(*[4] * 20), seed=1)
    rounds = [[order.document(20 * epoch + place).name for place in range(20)] for epoch in range(2)]
    assert sorted(rounds[0]) == sorted(rounds[1]) == sorted(str(number) for number in range(20))
    assert rounds[0] != rounds[1]
    other = Shuffled(documents_of(*[4] * 20), seed=2)
    assert [other.document(place).name for place in range(20)] != rounds[0]


def test_random_windows_lie_inside_one_document_and_reach_every_place():
    documents = documents_of(6, 3)
    windows = RandomWindows(documents, length=4, seed=0)
    seen = {bytes(windows.document(number).content.tolist()) for number in range(200)}
    first, second = (bytes(document.content.tolist()) for document in documents)
    assert seen == {first[0:4], first[1:5], first[2:6], second}


def test_windows_begin_afresh_in_all_rows_at_the_same_segment():
    windows = RandomWindows(documents_of(500), length=5 * 8 + 1, seed=0)
    batches = read(DocumentStream(windows, batch=2, segment=8), 10)
    assert [batch.fresh.tolist() for batch in batches] == ([[True, True]] + [[False, False]] * 4) * 2
    assert all(batch.real == 16 for batch in batches)


def test_only_answers_are_scored_where_a_document_tells_distances():
    distances = torch.zeros(7, dtype=torch.int64)
    distances[[1, 4]] = torch.tensor([3, 9])
    document = Document("asks", Document.of("", b"abcdefg").content, distances)
    first, second = DocumentStream(InOrder([document]), batch=1, segment=3)
    assert first.labels.tolist() == [[NOT_SCORED, ord("c"), NOT_SCORED]]
    assert second.labels.tolist() == [[NOT_SCORED, ord("f"), NOT_SCORED]]
    assert second.distances.tolist() == [[0, 9, 0]]
    assert (first.scored, first.real) == (1, 3)


@pytest.mark.parametrize("make", [InOrder, lambda d: Shuffled(d, 0), lambda d: RandomWindows(d, 4, 0)])
def test_documents_without_a_label_are_refused(make):
    with pytest.raises(ValueError, match="at least one document, got none"):
        make([])
    with pytest.raises(ValueError, match="at least 2 bytes each, got 1 in 'short'"):
        make([Document.of("short", b"x")])


@pytest.mark.parametrize(("batch", "segment", "name"), [(0, 4, "batch"), (2, 0, "segment")])
def test_sizes_below_one_are_refused(batch, segment, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        DocumentStream(InOrder(documents_of(9)), batch=batch, segment=segment)
