"""21.5: a document that begins in mid-segment begins anew, for the tokens from there on alone.

The oracle is the same model reading the same documents apart from each other.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers.checks import SAME_GRAPH, assert_close
from torch import Tensor

from memtrans import MemorizingTransformer
from memtrans.generation.decoder import Decoder

START, END, N = 0, 1, 8
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "xl": {"xl_max_memories": 5},
    "xl of more than a segment": {"xl_max_memories": 11},
    "a layer without a cache": {"xl_max_memories": 5, "xl_memory_layers": (1, 3)},
    "shifted": {"memorizing_layers": (2, 3), "shift_knn_memories_down": 1, "xl_max_memories": 5},
    "gate": {"combine": "gate"},
}
on_every_variant = pytest.mark.parametrize("variant", VARIANTS)


def build(**options: Any) -> MemorizingTransformer:
    torch.manual_seed(0)
    arguments = {
        "num_tokens": 30, "dim": 16, "depth": 3, "dim_head": 8, "heads": 2, "memorizing_layers": 2,
        "max_knn_memories": 64, "num_retrieved_memories": 4, "clear_memories_on_sos_token_id": START,
        "clear_memories_on_eos_token_id": END,
    }  # fmt: skip
    return MemorizingTransformer(**{**arguments, **options}).eval()


def tokens(*marks: tuple[int, int], length: int = 3 * N) -> Tensor:
    """One row (1, length) without start and end tokens but for (place, token) given."""
    row = torch.randint(2, 30, (1, length), generator=torch.Generator().manual_seed(3))
    for place, token in marks:
        row[0, place] = token
    return row


@torch.no_grad()
def read(model: MemorizingTransformer, pieces: list[Tensor]) -> tuple[Tensor, list[Any], Any]:
    """Logits (1, all tokens, V) of the pieces in their turn; the memories and caches behind them."""
    memories, caches, logits = model.create_knn_memories(batch_size=1), None, []
    for piece in pieces:
        result = model(piece, memories, xl_memories=caches)
        out, caches = result if model.num_xl_memory_layers else (result, None)
        logits.append(out)
    return torch.cat(logits, dim=1), list(memories), caches


def apart(model: MemorizingTransformer, text: Tensor, begins: list[int]) -> tuple[Tensor, list[Any], Any]:
    """The documents of a text that begin at these places, each cut where the text's segments are cut."""
    logits, behind = [], None
    for first, last in zip([0, *begins], [*begins, text.shape[1]], strict=True):
        cuts = sorted({first, last, *range(0, text.shape[1], N)} & set(range(first, last + 1)))
        if first == last:
            return torch.cat(logits, dim=1), list(model.create_knn_memories(batch_size=1)), None
        behind = read(model, [text[:, a:b] for a, b in itertools.pairwise(cuts)])
        logits.append(behind[0])
    assert behind is not None
    return torch.cat(logits, dim=1), behind[1], behind[2]


def held(memory: Any) -> tuple[Tensor, Tensor]:
    state = memory.state_dict()
    return state["keys"], state["values"]


MARKS = {
    "a start token": ([(11, START)], [11]),
    "an end token": ([(11, END)], [12]),
    "several": ([(9, START), (12, END), (14, START)], [9, 13, 14]),
    "at the first token": ([(8, START)], [8]),
    "an end token behind which nothing comes": ([(7, END), (15, END)], [8, 16]),
    "one in each segment": ([(3, START), (10, END), (20, START)], [3, 11, 20]),
}


@on_every_variant
@pytest.mark.parametrize("marks", MARKS)
def test_21_5_a_document_that_begins_in_mid_segment_is_read_as_if_alone(variant: str, marks: str) -> None:
    placed, begins = MARKS[marks]
    text = tokens(*placed)
    plain = build(**VARIANTS[variant], clear_memories_on_sos_token_id=None, clear_memories_on_eos_token_id=None)
    expected, memories, _ = apart(plain, text, begins)
    found, ours, _ = read(build(**VARIANTS[variant]), list(text.split(N, dim=1)))
    assert_close(found, expected, SAME_GRAPH)
    for mine, theirs in zip(ours, memories, strict=True):
        assert mine.lengths.tolist() == theirs.lengths.tolist()
        for got, wanted in zip(held(mine), held(theirs), strict=True):
            assert_close(got, wanted, SAME_GRAPH)


@on_every_variant
def test_21_5_before_the_token_nothing_changes(variant: str) -> None:
    model, text = build(**VARIANTS[variant]), tokens()
    before, _, _ = read(model, list(text.split(N, dim=1)))
    text[0, 19] = START
    after, _, _ = read(model, list(text.split(N, dim=1)))
    assert torch.equal(before[:, :19], after[:, :19])


def test_21_5_a_document_that_ends_with_the_text_leaves_an_empty_memory_and_no_cache_in_sight() -> None:
    model = build(xl_max_memories=5)
    _, memories, caches = read(model, [tokens((N - 1, END), length=N)])
    assert memories[0].lengths.tolist() == [0] and caches.length.tolist() == [0]
    continued, fresh = model(tokens(length=N), memories, xl_memories=caches), read(model, [tokens(length=N)])
    assert_close(continued[0], fresh[0], SAME_GRAPH)


def test_21_5_a_read_only_call_sees_as_much_and_clears_nothing() -> None:
    model, text = build(xl_max_memories=5), tokens((11, START), length=2 * N)
    memories = model.create_knn_memories(batch_size=1)
    _, caches = model(text[:, :N], memories)
    before = memories[0].lengths.tolist()
    only_read, _ = model(text[:, N:], memories, xl_memories=caches, add_knn_memory=False)
    assert memories[0].lengths.tolist() == before
    assert torch.equal(only_read, model(text[:, N:], memories, xl_memories=caches)[0])


def test_21_5_rows_begin_for_themselves() -> None:
    rows = [tokens((10, START)), tokens(), tokens((5, END), (15, END)), tokens((23, START))]
    model, text = build(xl_max_memories=5), torch.cat(rows)
    memories, caches, logits = model.create_knn_memories(batch_size=4), None, []
    for segment in text.split(N, dim=1):
        out, caches = model(segment, memories, xl_memories=caches)
        logits.append(out)
    for row, alone in enumerate(rows):
        expected, of_row, _ = read(model, list(alone.split(N, dim=1)))
        assert_close(torch.cat(logits, dim=1)[row : row + 1], expected, SAME_GRAPH, f"row {row}")
        assert int(memories[0].lengths[row]) == int(of_row[0].lengths)


def test_21_5_padding_says_nothing_and_the_document_behind_goes_on() -> None:
    """As with tokenizers whose padding is the end token."""
    model = build(xl_max_memories=5)
    text, lengths = tokens((3, START), (6, END), (7, END), length=N), torch.tensor([6])
    memories = model.create_knn_memories(batch_size=1)
    _, caches = model(text, memories, lengths=lengths)
    assert caches.length.tolist() == [3]
    more, _ = model(tokens(length=N), memories, xl_memories=caches)
    expected, _, _ = read(model, [text[:, 3:6], tokens(length=N)])
    assert_close(more, expected[:, 3:], SAME_GRAPH)


def test_21_5_gradients_of_a_document_are_those_of_the_document_alone() -> None:
    model, text = build(), tokens((3, START), length=N)
    grads = []
    for piece, first in ((text, 3), (text[:, 3:], 0)):
        model.zero_grad()
        logits = model(piece, model.create_knn_memories(batch_size=1))
        logits[:, first:].square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert_close(grad, grads[1][name], SAME_GRAPH, name)


@on_every_variant
@pytest.mark.parametrize("marks", MARKS)
def test_21_5_a_decoder_reads_and_writes_what_the_model_reads(variant: str, marks: str) -> None:
    """Two rows, of which one has read less: pieces of several tokens, then single ones."""
    text, other = tokens(*MARKS[marks][0]), tokens((13, START), (21, END))
    model = build(**VARIANTS[variant])
    expected = [read(model, list(row.split(N, dim=1))) for row in (text, other[:, 1:])]
    decoder = Decoder(model, 2, segment=N)
    steps = 14
    found = [decoder.read([text[0, :-steps], other[0, 1:-steps]])]
    for place in range(3 * N - steps, 3 * N):
        found.append(decoder.step(torch.stack((text[0, place], other[0, place]))))
    logits = torch.stack(found)  # (steps + 1, 2, V)
    assert_close(logits[:, 0], expected[0][0][0, -steps - 1 :], SAME_GRAPH)
    assert_close(logits[:, 1], expected[1][0][0, -steps - 1 :], SAME_GRAPH)
    for mine, theirs in zip(decoder.memories, expected[0][1], strict=True):
        assert int(mine.lengths[0]) == int(theirs.lengths)


@on_every_variant
def test_21_5_a_text_that_a_decoder_reads_in_pieces_is_the_text(variant: str) -> None:
    model, text = build(**VARIANTS[variant]), tokens((3, START), (12, END), (17, START))
    expected, _, _ = read(model, list(text.split(N, dim=1)))
    decoder, read_so_far = Decoder(model, 1, segment=N), 0
    for count in (2, 3, 5, 1, 7, 6):
        logits = decoder.read([text[0, read_so_far : read_so_far + count]])
        read_so_far += count
        assert_close(logits, expected[:, read_so_far - 1], SAME_GRAPH, f"after {read_so_far}")


def test_21_5_legacy_clears_whole_rows_as_upstream_means_it() -> None:
    model, text = build(legacy=True), tokens((11, START))
    memories = model.create_knn_memories(batch_size=1)
    for segment in text[:, : 2 * N].split(N, dim=1):
        model(segment, memories)
    assert memories[0].lengths.tolist() == [N]


def test_21_5_compiled_it_is_the_same() -> None:
    model, text = build(xl_max_memories=5), tokens((11, START), (20, END))
    expected, memories, _ = read(model, list(text.split(N, dim=1)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    ours, caches, logits = model.create_knn_memories(batch_size=1), None, []
    with torch.no_grad():
        for segment in text.split(N, dim=1):
            out, caches = compiled(segment, ours, xl_memories=caches)
            logits.append(out)
    assert_close(torch.cat(logits, dim=1), expected, SAME_GRAPH)
    assert ours[0].lengths.tolist() == memories[0].lengths.tolist()
