"""What rows carry from segment to segment: a document reads the same whatever its neighbours in the batch are."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from memtrans.data.documents import Document, InOrder
from memtrans.data.stream import DocumentStream
from memtrans.training.model import build_model
from memtrans.training.reader import DocumentReader
from memtrans.training.settings import Settings

SMALL = Settings(layers=3, width=16, heads=2, head_width=8, memory=32, memory_layers=(2,), neighbours=4)
VARIANTS = {
    "plain": SMALL,
    "xl": dataclasses.replace(SMALL, xl=6),
    "xl in the memory layer": dataclasses.replace(SMALL, xl=20, xl_layers=(2, 3)),
    "grouped heads": dataclasses.replace(SMALL, kv_heads=2, xl=6),
    "no memory": dataclasses.replace(SMALL, memory=0, xl=6),
}


def documents() -> list[Document]:
    generator = torch.Generator().manual_seed(0)
    lengths = (40, 17, 9, 33, 26)
    contents = [torch.randint(0, 256, (length,), generator=generator, dtype=torch.uint8) for length in lengths]
    return [Document(str(number), content) for number, content in enumerate(contents)]


def logits_of(model, stream: DocumentStream) -> dict[str, torch.Tensor]:
    """Every document's logits (length - 1, V), as the rows of a stream read them."""
    reader = DocumentReader(model, stream.batch)
    found: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad():
        for batch in stream:
            logits = reader.read(batch)
            names = [row.document.name if row.document else "" for row in stream._rows]
            for row, name in enumerate(names):
                found.setdefault(name, []).append(logits[row, : batch.lengths[row]])
    found.pop("", None)
    return {name: torch.cat(pieces) for name, pieces in found.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_document_reads_the_same_alone_as_after_others_in_a_row_of_a_batch(variant):
    torch.manual_seed(0)
    model = build_model(VARIANTS[variant])
    together = logits_of(model, DocumentStream(InOrder(documents()), batch=2, segment=8))
    for document in documents():
        alone = logits_of(model, DocumentStream(InOrder([document]), batch=1, segment=8))
        torch.testing.assert_close(together[document.name], alone[document.name])


@pytest.mark.parametrize("variant", ["plain", "xl"])
def test_a_document_reads_on_what_it_said_segments_ago(variant):
    torch.manual_seed(0)
    model = build_model(VARIANTS[variant])
    (first, *_) = documents()
    changed = Document("changed", first.content.clone())
    changed.content[0] += 1
    left, right = (logits_of(model, DocumentStream(InOrder([d]), batch=1, segment=8)) for d in (first, changed))
    difference = (left[first.name] - right["changed"]).abs().amax(dim=1)
    assert (difference[24:] > 0).any()


def test_padding_is_not_stored():
    torch.manual_seed(0)
    model = build_model(SMALL)
    reader = DocumentReader(model, 2)
    stream = DocumentStream(InOrder([Document.of("short", b"abcde"), Document.of("long", b"x" * 30)]), 2, 8)
    reader.read(stream.next())
    assert reader.memories[0].lengths.tolist() == [4, 8]
    reader.read(stream.next())
    assert reader.memories[0].lengths.tolist() == [4, 16]


def test_padding_is_not_cached():
    torch.manual_seed(0)
    reader = DocumentReader(build_model(VARIANTS["xl"]), 2)
    stream = DocumentStream(InOrder([Document.of("short", b"abcde"), Document.of("long", b"x" * 30)]), 2, 8)
    reader.read(stream.next())
    assert reader.carried.xl_length.tolist() == [4, 6]
    assert reader.memories[0].lengths.tolist() == [0, 2], "of 4 tokens none leaves a cache of 6"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_document_reads_the_same_in_segments_that_end_early(variant):
    """Segments of 8 that hold 3 to 8 tokens, next to a row in whole segments, against unpadded segments."""
    torch.manual_seed(0)
    model = build_model(VARIANTS[variant])
    tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(1))
    together, alone = DocumentReader(model, 2), DocumentReader(model, 1)
    begin, carried = 0, alone.carried
    with torch.no_grad():
        for number, real in enumerate((5, 8, 3, 7)):
            padded = torch.full((2, 8), number)
            padded[0, :real] = tokens[0, begin : begin + real]
            padded[1] = tokens[1, 8 * number : 8 * number + 8]
            lengths, fresh = torch.tensor([real, 8]), torch.full((2,), number == 0)
            logits, left = together.forward(padded, lengths, fresh, together.carried)
            together.carry(left)
            expected, carried = alone.forward(padded[:1, :real], lengths[:1], fresh[:1], carried)
            torch.testing.assert_close(logits[0, :real], expected[0])
            begin += real
    assert [memory.lengths[0] for memory in together.memories] == [memory.lengths[0] for memory in alone.memories]


def test_a_memory_that_is_kept_holds_what_the_rows_earlier_documents_said():
    torch.manual_seed(0)
    model = build_model(VARIANTS["xl"])
    stream = DocumentStream(InOrder([Document.of("a", b"x" * 25), Document.of("b", b"y" * 25)]), batch=1, segment=8)
    reader = DocumentReader(model, 1, keep_memory=True)
    for batch in stream:
        reader.read(batch)
    assert reader.memories[0].lengths.tolist() == [32]  # of 48 tokens: the XL cache and the memory's own room
    assert int(reader.carried.xl_length[0]) == 6, "the local context begins anew"


def test_without_retrieval_nothing_is_stored():
    torch.manual_seed(0)
    model = build_model(SMALL)
    reader = DocumentReader(model, 1, retrieval=False)
    for batch in DocumentStream(InOrder(documents()[:1]), 1, 8):
        reader.read(batch)
    assert reader.memories[0].lengths.tolist() == [0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_reader_that_loads_the_state_of_another_goes_on_with_the_same_bits(variant):
    torch.manual_seed(0)
    model = build_model(VARIANTS[variant])
    streams = [DocumentStream(InOrder(documents()), batch=2, segment=8) for _ in range(2)]
    first, second = DocumentReader(model, 2), DocumentReader(model, 2)
    with torch.no_grad():
        for _ in range(4):
            first.read(streams[0].next())
            streams[1].next()
        second.load_state_dict(first.state_dict())
        for left, right in zip(*streams, strict=True):
            assert torch.equal(first.read(left), second.read(right))


def test_a_state_of_another_model_is_refused():
    state = DocumentReader(build_model(VARIANTS["xl"]), 2).state_dict()
    with pytest.raises(ValueError, match="state must hold XL caches of this model"):
        DocumentReader(build_model(dataclasses.replace(SMALL, xl=7)), 2).load_state_dict(state)
