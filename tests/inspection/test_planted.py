"""Facts that were planted in a document: where an answer is right, the first passage that it cites holds the fact."""

from __future__ import annotations

import pytest
import torch

from memtrans.data.documents import InOrder
from memtrans.data.recall import FAR, RecallDocuments, RecallTask
from memtrans.data.stream import DocumentStream
from memtrans.presets import PRESETS
from memtrans.training.data import open_data
from memtrans.training.reader import DocumentReader
from memtrans.training.trainer import Trainer

DOCUMENTS = 3


@pytest.mark.slow
@pytest.mark.timeout(900)
@torch.no_grad()
def test_the_first_passage_of_a_right_answer_holds_the_fact() -> None:
    """Of the recall preset; a fact is five bytes, `ab=x;`, and the passage has to hold its letter."""
    settings = PRESETS["recall"]
    trainer = Trainer(settings, open_data(settings), torch.device("cpu"))
    with torch.enable_grad():
        for _ in range(settings.steps):
            trainer.advance()
    model, right, found = trainer.model.eval(), 0, 0
    for number in range(DOCUMENTS):
        document = RecallDocuments("planted", RecallTask()).document(number)
        reader = DocumentReader(model, 1)
        with reader.memories.tracing() as trace:
            batches = DocumentStream(InOrder([document]), batch=1, segment=settings.segment)
            logits = torch.cat([reader.read(batch) for batch in batches], dim=1)[0]
        assert document.distances is not None
        for place in (document.distances >= FAR).nonzero().flatten().tolist():
            if int(logits[place].argmax()) == int(document.content[place + 1]):
                letter = place + 1 - int(document.distances[place])
                (passage,) = trace.passages(0, top=1, queries=[place])
                right, found = right + 1, found + (passage.begin <= letter < passage.end)
    assert right > 200
    assert found >= 0.9 * right
