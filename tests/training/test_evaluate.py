"""Evaluation reads the same held-out bytes with and without the memory and leaves the model as it was."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
import torch.nn.functional as F

from memtrans import cross_entropy
from memtrans.data.documents import Document
from memtrans.data.recall import CHANCE, FAR, RecallDocuments, RecallTask
from memtrans.inspection.sample import sample_retrievals
from memtrans.training.evaluate import evaluate, evaluate_both, held_out_stream
from memtrans.training.model import build_model
from memtrans.training.reader import DocumentReader
from memtrans.training.settings import Settings

SMALL = Settings(layers=2, width=16, heads=2, head_width=8, memory=64, neighbours=4, dropout=0.5)


def texts() -> list[Document]:
    return [Document.of(str(number), b"to be or not to be, " * (3 + number)) for number in range(3)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(SMALL)


def test_bits_per_byte_are_those_of_every_byte_but_the_first_of_each_document(model):
    model.eval()
    bits = 0.0
    for document in texts():
        tokens = document.content.long()[None]
        logits = model(tokens[:, :-1], knn_memories=model.create_knn_memories(batch_size=1))
        bits += F.cross_entropy(logits[0], tokens[0, 1:], reduction="sum").item() / math.log(2)
    found = evaluate(model, held_out_stream(texts(), batch=2, segment=200), most_bytes=10**6)
    assert found.scored == sum(len(document) - 1 for document in texts())
    assert found.bits_per_byte == pytest.approx(bits / found.scored)


def test_bits_are_told_apart_by_where_in_its_document_a_segment_begins(model):
    documents = [Document.of("long", bytes(range(97, 123)) * 100), Document.of("short", b"to be or not to be" * 20)]
    found = evaluate(model, held_out_stream(documents, batch=2, segment=256), most_bytes=10**6)
    assert set(found.by_position) == {0, 512, 1024, 2048}
    alone = evaluate(model, held_out_stream(documents[:1], batch=1, segment=256), most_bytes=10**6)
    for position in (512, 1024, 2048):
        assert found.by_position[position] == pytest.approx(alone.by_position[position])
    length = len(documents[0]) - 1
    bounds = [0, 512, 1024, 2048, length]
    parts = zip(bounds, bounds[1:], alone.by_position.values(), strict=False)
    assert sum((end - begin) * bits for begin, end, bits in parts) / length == pytest.approx(alone.bits_per_byte)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_vocabulary_is_scored_the_same_in_chunks(model, monkeypatch, dtype):
    def found():
        return evaluate(model, held_out_stream(texts(), batch=2, segment=8), most_bytes=10**6, dtype=dtype)

    expected = found()
    monkeypatch.setattr(cross_entropy, "MOST_LOGITS", 0)
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 5 * 256)
    monkeypatch.setattr("memtrans.training.evaluate.negative_log_likelihood", None)  # of all logits
    in_chunks = found()
    assert in_chunks.by_position == pytest.approx(expected.by_position)
    assert in_chunks.nats_per_token == pytest.approx(expected.nats_per_token)
    assert (in_chunks.scored, in_chunks.tokens) == (expected.scored, expected.tokens)


def test_both_evaluations_score_the_same_bytes_and_differ_by_the_memory(model):
    report = evaluate_both(model, texts(), batch=2, segment=8, most_bytes=10**6)
    assert report["eval_scored_bytes"] == sum(len(document) - 1 for document in texts())
    assert report["eval_bits_per_byte"] != report["eval_bits_per_byte_without_memory"]


def test_documents_may_read_on_in_the_memory_of_the_one_before(model):
    reset, kept = (
        evaluate(model, held_out_stream(texts(), batch=1, segment=8), 10**6, keep_memory=keep) for keep in (False, True)
    )
    assert reset.scored == kept.scored
    assert reset.bits_per_byte != kept.bits_per_byte


def test_an_evaluation_stops_after_the_bytes_asked_for_and_is_the_same_again(model):
    reports = [evaluate(model, held_out_stream(texts(), 2, 8), most_bytes=33) for _ in range(2)]
    assert reports[0] == reports[1]
    assert 33 <= reports[0].scored < 33 + 16


def test_a_model_in_training_is_evaluated_without_dropout_and_goes_on_in_training(model):
    model.train()
    first = evaluate(model, held_out_stream(texts(), 2, 8), most_bytes=100)
    second = evaluate(model, held_out_stream(texts(), 2, 8), most_bytes=100)
    assert first == second
    assert model.training


def test_far_questions_are_counted_and_an_untrained_model_does_not_answer_them(model):
    documents = [RecallDocuments("held out", RecallTask()).document(number) for number in range(2)]
    report = evaluate_both(model, documents, batch=2, segment=128, most_bytes=10**6)
    asked = sum(int((document.distances >= FAR).sum()) for document in documents)
    assert report["recall_questions"] == asked > 50
    assert report["recall_chance"] == CHANCE
    assert report["recall_accuracy"] < 0.2


def sample(model, documents, segment):
    reader = DocumentReader(model, 1)
    return sample_retrievals(model, documents, segment, reader.read, reader.memories)


def test_a_sample_shows_text_that_the_memory_held_before_the_token(model):
    (document,) = texts()[2:]
    found = sample(model, texts(), 16)
    whole = bytes(document.content.tolist()).decode()
    assert "".join(found.records.document) == whole
    assert whole.endswith("".join(token.text for token in found.records.written))
    first = len(document) - len(found.records.written)
    assert first == (-(-(len(document) - 1) // 16) - 2) * 16 + 1
    lines = found.lines(3)
    assert len(lines) == 3
    for line, place in zip(lines, range(first, len(document), len(found.asked) // 3), strict=False):
        written, distance = re.fullmatch(
            r'"(.*)" was written: \d+% .* memory, \d+% from ".*", (\d+) tokens before', line
        ).groups()
        assert f"[{whole[place]}]" in written and 0 < int(distance) <= place


def test_a_sample_finds_the_entry_with_the_same_past(model):
    """An exact copy of a context far back is the nearest key of the copy, for a layer that sees only so much."""
    torch.manual_seed(0)
    only = build_model(dataclasses.replace(SMALL, layers=1, memory_layers=(1,)))
    attention = only.layers[0][0].fn
    attention.to_kv.weight.data[: SMALL.head_width] = attention.to_q.weight.data[: SMALL.head_width]
    attention.to_q.weight.data = attention.to_q.weight.data[: SMALL.head_width].repeat(SMALL.heads, 1)
    document = Document.of("letters", bytes(range(97, 123)) + bytes(range(97, 123)))
    records = sample(only, [document], 26).records
    assert len(records.written) == 25
    for token in records.written:  # the letter before the written one stood there
        assert records.trace.citations(0, 1)[token.query].best[0].position == token.query


@pytest.mark.parametrize("settings", [dataclasses.replace(SMALL, memory=0), SMALL])
def test_there_is_no_sample_without_a_memory_or_before_a_second_segment(settings):
    assert sample(build_model(settings), texts()[:1], 500) is None
