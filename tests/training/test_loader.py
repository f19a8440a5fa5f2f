"""A step's inputs are the stream's segments in order, and a loader's state is that of the steps that were taken."""

from __future__ import annotations

import torch

from memtrans.data.documents import Document, Shuffled
from memtrans.data.stream import NOT_SCORED, Batch, DocumentStream
from memtrans.training.loader import StepInputs, StepLoader

BATCH, SEGMENT, ACCUMULATE, SEGMENTS = 3, 8, 2, 2


def stream() -> DocumentStream:
    """Documents of 5 to 45 bytes: most end within a step."""
    documents = [Document.of(str(number), bytes(range(5 * (number + 1)))) for number in range(9)]
    return DocumentStream(Shuffled(documents, seed=0), BATCH, SEGMENT)


def loader() -> StepLoader:
    return StepLoader(stream(), ACCUMULATE, SEGMENTS, torch.device("cpu"))


def assert_same(left: StepInputs, right: StepInputs) -> None:
    for a, b in zip(left.tensors(), right.tensors(), strict=True):
        assert torch.equal(a, b)


def test_a_step_reads_the_segments_of_its_rounds_in_the_streams_order() -> None:
    source, loads = stream(), loader()
    for _ in range(5):
        inputs, real = loads.take()
        batches: list[Batch] = []
        for segments in inputs.rounds():
            for tokens, labels, lengths, fresh in segments:
                batch = source.next()
                assert batch is not None
                batches.append(batch)
                assert torch.equal(tokens, batch.tokens) and torch.equal(labels, batch.labels)
                assert torch.equal(lengths, batch.lengths) and torch.equal(fresh, batch.fresh)
        assert len(batches) == ACCUMULATE * SEGMENTS
        assert real == sum(batch.real for batch in batches)
        assert inputs.scored == sum((batch.labels != NOT_SCORED).sum() for batch in batches)


def test_a_step_without_a_scored_label_divides_by_one() -> None:
    nothing = torch.zeros(1, 4, dtype=torch.int64)
    lengths, fresh = torch.tensor([4]), torch.tensor([False])
    batch = Batch(nothing, nothing - 1, lengths, fresh, lengths, None, scored=0, real=4)
    assert StepInputs.of([[batch]]).scored == 1


def test_what_was_drawn_ahead_is_no_part_of_the_state() -> None:
    """As on a GPU, where the next step is drawn while this one runs."""
    ahead, plain = loader(), loader()
    for _ in range(3):
        assert_same(ahead.take()[0], plain.take()[0])
        ahead._ahead = ahead._draw()
        assert ahead.state_dict() == plain.state_dict()
    resumed = loader()
    resumed.take()
    resumed.load_state_dict(ahead.state_dict())
    for _ in range(3):
        expected, real = plain.take()
        for other in (ahead, resumed):
            actual, other_real = other.take()
            assert_same(actual, expected)
            assert other_real == real


def test_loading_a_state_forgets_what_was_drawn_ahead() -> None:
    moved, plain = loader(), loader()
    beginning = plain.state_dict()
    moved.take()
    moved._ahead = moved._draw()
    moved.load_state_dict(beginning)
    assert_same(moved.take()[0], plain.take()[0])
