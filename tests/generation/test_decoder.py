"""Reading and continuing documents one token at a time is reading them in segments, row by row, as training does."""

from __future__ import annotations

import pytest
import torch
from helpers.checks import SAME_GRAPH, assert_close
from helpers.devices import DEVICE, seeded

from memtrans import KNNMemoryList, MemorizingTransformer
from memtrans.generation.decoder import Decoder

pytestmark = pytest.mark.device

SEGMENT, VOCABULARY, STEPS = 8, 30, 20
PROMPTS = (37, 16, 5, 1, 0, 21)  # tokens that each row reads before it writes
SMALL = {"num_tokens": VOCABULARY, "dim": 16, "depth": 4, "dim_head": 8, "heads": 4, "num_retrieved_memories": 4}
VARIANTS: dict[str, dict] = {
    "plain": {},
    "no memory": {"memorizing_layers": ()},
    "xl in every layer": {"xl_max_memories": 6},
    "xl of one segment": {"xl_max_memories": 8},
    "xl of more than a segment": {"xl_max_memories": 20, "xl_memory_layers": (2, 3)},
    "a memory for each head": {"kv_heads": 4, "xl_max_memories": 6},
    "groups of heads": {"kv_heads": 2, "knn_attn_heads": 6},
    "several memory layers": {"memorizing_layers": (2, 3), "xl_max_memories": 6},
    "memories shifted": {"memorizing_layers": (2, 3, 4), "shift_knn_memories_down": 1, "xl_max_memories": 6},
    "caches shifted": {"xl_max_memories": 20, "shift_xl_memories_down": 1},
    "memory wraps round while writing": {"max_knn_memories": 11, "xl_max_memories": 3},
    "legacy": {"legacy": True, "xl_max_memories": 20, "memorizing_layers": (2, 3), "shift_knn_memories_down": 1},
    "legacy without xl": {"legacy": True},
    "offset": {"memory_offset": -2.0},
    "gate": {"combine": "gate", "xl_max_memories": 6},
    "gate, a memory for each head": {"combine": "gate", "kv_heads": 4, "memorizing_layers": (2, 3)},
    "a query of the memory's own": {"memory_query": "own", "memory_offset": 1.0, "xl_max_memories": 6},
}


def build(**options) -> MemorizingTransformer:
    torch.manual_seed(0)
    model = MemorizingTransformer(**{**SMALL, "max_knn_memories": 100, "pad_id": -1, **options}).eval()
    for name, parameter in model.named_parameters():
        if name.endswith((".memory_mix", ".memory_sharpness")):  # which start at 0
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def memories_of(model, batch: int) -> KNNMemoryList:
    """Empty memories in the precision of the model: then it is the decoder that differs, not how keys are rounded."""
    return model.create_knn_memories(batch_size=batch, device=DEVICE, dtype=torch.float32, spare=SEGMENT)


def decoder_of(model, batch: int) -> Decoder:
    return Decoder(model, batch, segment=SEGMENT, memories=memories_of(model, batch))


def texts(low: int = 2) -> list[torch.Tensor]:
    lengths = [prompt + STEPS for prompt in PROMPTS]
    return [torch.randint(low, VOCABULARY, (length,), generator=seeded(length)) for length in lengths]


@torch.no_grad()
def by_segments(model, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (P, V) of a text that is read alone, segment by segment, and how many entries each memory then holds."""
    memories, caches, pieces = memories_of(model, 1), None, []
    for segment in text[None].split(SEGMENT, dim=1):
        whole = segment.shape[1] == SEGMENT  # what is not complete has not reached the memory yet
        result = model(segment, memories, caches, add_knn_memory=whole)
        logits, caches = result if model.num_xl_memory_layers else (result, None)
        pieces.append(logits[0])
    return torch.cat(pieces), torch.tensor([int(memory.lengths[0]) for memory in memories])


def by_tokens(model, rows: list[torch.Tensor]) -> tuple[torch.Tensor, Decoder]:
    """Logits (B, STEPS + 1, V) after each row's prompt and after every token that follows."""
    decoder = decoder_of(model, len(rows))
    found = [decoder.read([row[:-STEPS] for row in rows])]
    for number in range(STEPS):
        found.append(decoder.step(torch.stack([row[len(row) - STEPS + number] for row in rows])))
    return torch.stack(found, dim=1), decoder


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_at_different_places_read_token_by_token_what_each_alone_reads_in_segments(variant):
    model, rows = build(**VARIANTS[variant]), texts()
    found, decoder = by_tokens(model, rows)
    for row, text in enumerate(rows):
        expected, held = by_segments(model, text)
        first = 1 if len(text) == STEPS else 0  # nothing was read before the first token of an empty prompt
        assert_close(found[row, first:], expected[len(text) - STEPS - 1 + first :], SAME_GRAPH, f"row {row}")
        assert [int(memory.lengths[row]) for memory in decoder.memories] == held.tolist()


@pytest.mark.parametrize("variant", ["plain", "xl of more than a segment", "legacy"])
def test_a_text_read_in_pieces_is_the_text(variant):
    model, text = build(**VARIANTS[variant]), texts()[0]
    expected, _ = by_segments(model, text)
    decoder = decoder_of(model, 2)
    for piece in text.split([3, 20, 1, len(text) - 24]):
        other = piece[:2]  # the second row is somewhere else all the time
        logits = decoder.read([piece, other])
    assert_close(logits[0], expected[-1], SAME_GRAPH)


def test_an_end_token_clears_when_its_segment_is_complete_and_a_start_token_at_the_beginning_of_one():
    model = build(clear_memories_on_sos_token_id=0, clear_memories_on_eos_token_id=1, xl_max_memories=6)
    rows = texts()
    rows[0][-15], rows[1][24], rows[5][2] = 1, 0, 1
    found, decoder = by_tokens(model, rows)
    for row, text in enumerate(rows):
        expected, held = by_segments(model, text)
        first = 1 if len(text) == STEPS else 0
        assert_close(found[row, first:], expected[len(text) - STEPS - 1 + first :], SAME_GRAPH, f"row {row}")
        assert int(decoder.memories[0].lengths[row]) == int(held[0])


def test_of_a_segment_with_a_start_token_what_comes_from_it_on_is_stored():
    """`test_beginnings.py` has the rest."""
    model, rows = build(clear_memories_on_sos_token_id=0), [text[:19] for text in texts()[:2]]
    decoder = decoder_of(model, 2)
    decoder.read(rows)
    assert decoder.memories[0].lengths.tolist() == [16, 16]
    decoder.step(torch.tensor([0, 7]))
    assert decoder.memories[0].lengths.tolist() == [16, 16], "nothing reaches a memory before its segment's end"
    for _ in range(4):
        decoder.step(torch.tensor([5, 5]))
    assert decoder.memories[0].lengths.tolist() == [5, 24]


def test_memories_that_were_filled_before_are_searched_and_grow():
    model, rows = build(), texts()[:2]
    fresh = decoder_of(model, 2)
    without = fresh.read([row[-10:] for row in rows])
    filled = memories_of(model, 2)
    for segment in torch.stack([row[:16] for row in rows]).split(SEGMENT, dim=1):
        model(segment, filled)
    decoder = Decoder(model, 2, segment=SEGMENT, memories=filled)
    logits = decoder.read([row[-10:] for row in rows])
    assert not torch.allclose(logits, without)
    assert filled[0].lengths.tolist() == [24, 24]


def test_a_row_that_has_stopped_stays_where_it_is():
    model, rows = build(xl_max_memories=6), [text[:11] for text in texts()[:2]]
    decoder = decoder_of(model, 2)
    decoder.read(rows)
    for _ in range(2 * SEGMENT):
        decoder.advance(torch.tensor([3, 3]), torch.tensor([True, False]))
        decoder.move_on()
    assert decoder.position.tolist() == [3, 3]
    assert decoder.memories[0].lengths.tolist() == [18, 2]
    other = decoder_of(model, 1)
    other.read(rows[1:])
    assert_close(decoder.step(torch.tensor([5, 5]))[1:], other.step(torch.tensor([5])), SAME_GRAPH)


STOPS = (3, 20, 9)  # steps that each row makes before it stops, of 20


def stopped_decoder(model, rows: list[torch.Tensor]) -> tuple[Decoder, list[int]]:
    """Rows that have read a prompt and then written until each stopped; and how many tokens of its text each has."""
    prompts = (13, 6, 16)
    decoder = decoder_of(model, len(rows))
    decoder.read([row[:prompt] for row, prompt in zip(rows, prompts, strict=True)])
    for number in range(STEPS):
        decoder.advance(
            torch.stack([row[prompt + number] for row, prompt in zip(rows, prompts, strict=True)]),
            torch.tensor([number < stop for stop in STOPS]),
        )
        decoder.move_on()
    return decoder, [prompt + stop for prompt, stop in zip(prompts, STOPS, strict=True)]


def texts_of_one_length() -> list[torch.Tensor]:
    return [torch.randint(2, VOCABULARY, (60,), generator=seeded(row)) for row in range(len(STOPS))]


@pytest.mark.parametrize("variant", ["plain", "xl in every layer", "xl of more than a segment", "legacy"])
def test_rows_that_have_stopped_read_on_from_where_each_stands(variant):
    model, rows = build(**VARIANTS[variant]), texts_of_one_length()
    decoder, places = stopped_decoder(model, rows)
    for count in (0, 1, 11):
        logits = decoder.read([row[place : place + count] for row, place in zip(rows, places, strict=True)])
        places = [place + count for place in places]
        for row, place in enumerate(places):
            expected, held = by_segments(model, rows[row][:place])
            assert_close(logits[row], expected[-1], SAME_GRAPH, f"row {row}")
            assert [int(memory.lengths[row]) for memory in decoder.memories] == held.tolist()


@pytest.mark.parametrize("variant", ["plain", "xl in every layer", "xl of more than a segment", "legacy"])
def test_rows_that_have_stopped_write_on_from_where_each_stands(variant):
    model, rows = build(**VARIANTS[variant]), texts_of_one_length()
    decoder, places = stopped_decoder(model, rows)
    for number in range(2 * SEGMENT):
        logits = decoder.step(torch.stack([row[place + number] for row, place in zip(rows, places, strict=True)]))
    for row, place in enumerate(places):
        expected, held = by_segments(model, rows[row][: place + 2 * SEGMENT])
        assert_close(logits[row], expected[-1], SAME_GRAPH, f"row {row}")
        assert [int(memory.lengths[row]) for memory in decoder.memories] == held.tolist()


def test_logits_that_were_returned_stay_as_they_are():
    decoder = decoder_of(build(), 2)
    read = decoder.read(texts()[:2])
    before = read.clone()
    written = decoder.step(torch.tensor([5, 6]))
    assert torch.equal(read, before)
    kept = written.clone()
    decoder.step(torch.tensor([7, 8]))
    assert torch.equal(written, kept)


def test_under_autocast_keys_and_values_are_kept_in_its_dtype():
    model, rows = build(xl_max_memories=6), texts()[:2]
    with torch.autocast(DEVICE, torch.bfloat16):
        found, decoder = by_tokens(model, rows)
    assert decoder._caches[0].keys.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: Decoder(m, 0), ValueError, "batch must be at least 1, got 0"),
        (lambda m: Decoder(m, 1, segment=0), ValueError, "segment must be at least 1, got 0"),
        (lambda m: Decoder(m, 2).read([torch.tensor([1])]), ValueError, "one text for each of the 2 rows, got 1"),
        (lambda m: Decoder(m, 1).read([[1, 2]]), TypeError, "texts must be a torch.Tensor, got list"),
        (
            lambda m: Decoder(m, 1).read([torch.ones(1, 3).long()]),
            ValueError,
            r"token ids \(P,\), got torch.int64 \(1, 3\)",
        ),
        (lambda m: Decoder(m, 2).step([1, 2]), TypeError, "tokens must be a torch.Tensor, got list"),
        (lambda m: Decoder(m, 2).step(torch.tensor([1])), ValueError, r"of shape \(2,\), got \(1,\)"),
        (lambda m: Decoder(m, 2).step(torch.tensor([[1], [2]])), ValueError, r"of shape \(2,\), got \(2, 1\)"),
        (lambda m: Decoder(m, 1).read([torch.tensor([30])]), IndexError, r"texts must be token ids in \[0, 30\)"),
        (
            lambda m: Decoder(m, 1, memories=build(dim_head=5).create_knn_memories(batch_size=1)),
            ValueError,
            r"knn_memories\[0\] must have .* dim=8, got .* dim=5",
        ),
        (
            lambda m: Decoder(m, 1, memories=build(memorizing_layers=(2, 3)).create_knn_memories(batch_size=1)),
            ValueError,
            r"one memory for each of the layers \(2,\), got 2",
        ),
        (
            lambda m: Decoder(m, 1, memories=m.create_knn_memories(batch_size=3)),
            ValueError,
            "batch's 1 documents in scope, .* got 3 documents",
        ),
    ],
)
def test_a_wrong_call_names_argument_value_and_expectation(call, error, message):
    with pytest.raises(error, match=message):
        call(build())


@pytest.mark.cpu
def test_an_id_outside_the_vocabulary_is_refused_before_anything_is_read():
    decoder = Decoder(build(), 2, segment=SEGMENT)
    with pytest.raises(IndexError):
        decoder.read([torch.tensor([1] * 20), torch.tensor([1, 99])])
    with pytest.raises(IndexError, match=r"tokens must be token ids in \[0, 30\), got -1"):
        decoder.step(torch.tensor([1, -1]))
    assert decoder.position.tolist() == [0, 0]
    assert decoder.memories[0].lengths.tolist() == [0, 0]
