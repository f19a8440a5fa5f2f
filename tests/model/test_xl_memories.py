"""Rows of a batch with padding in the middle of their documents: XL caches and memories hold real tokens alone."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from helpers.checks import SAME_GRAPH, assert_close
from helpers.devices import seeded

from memtrans import MemorizingTransformer
from memtrans.xl_memories import XLMemories

BATCH, LENGTH, VOCABULARY = 3, 4, 30
REAL = torch.tensor([[2, 4, 1], [4, 1, 3], [1, 4, 4], [4, 3, 2], [4, 4, 4]])  # tokens of each row in each segment
VARIANTS = {
    "a cache shorter than a segment": {"xl_max_memories": 3},
    "a cache of one segment": {"xl_max_memories": 4},
    "a cache longer than the text": {"xl_max_memories": 30},
    "grouped heads, a gate": {"xl_max_memories": 6, "kv_heads": 2, "combine": "gate"},
    "some layers": {"xl_max_memories": 6, "xl_memory_layers": (1, 3)},
    "shifts": {"xl_max_memories": 6, "shift_xl_memories_down": 1, "shift_knn_memories_down": 1},
    "upstream's positions": {"xl_max_memories": 6, "legacy": True},
}


def build(**options) -> MemorizingTransformer:
    torch.manual_seed(0)
    small = {"num_tokens": VOCABULARY, "dim": 16, "depth": 4, "dim_head": 8, "heads": 2, "num_retrieved_memories": 3}
    return MemorizingTransformer(**{**small, "max_knn_memories": 50, "memorizing_layers": (2, 3), **options}).eval()


def tokens(padding: int = 0) -> torch.Tensor:
    """Segments (5, B, N) with REAL tokens of each row."""
    real = torch.randint(2, VOCABULARY, (len(REAL), BATCH, LENGTH), generator=seeded(1))
    return torch.where(torch.arange(LENGTH) < REAL[..., None], real, padding)


@torch.no_grad()
def read(model, texts, **options):
    """Logits and XL memories of each segment, and the memories in the end; `options` are one list for all segments."""
    memories, xl_memories, results = model.create_knn_memories(batch_size=texts[0].shape[0]), None, []
    for number, text in enumerate(texts):
        extra = {name: values[number] for name, values in options.items()}
        logits, xl_memories = model(text, memories, xl_memories, **extra)
        results.append((logits, xl_memories))
    return results, memories


def entries(memory, row: int, kv_heads: int) -> torch.Tensor:
    """Keys and values (2, G, entries, D) of a document, old to new."""
    state, rows = memory.state_dict(), slice(row * kv_heads, (row + 1) * kv_heads)
    pairs = torch.stack((state["keys"][rows], state["values"][rows]))
    return pairs[:, :, pairs.shape[2] - int(state["lengths"][rows][0]) :]


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_in_the_middle_of_a_document_leaves_no_trace(variant):
    """Whatever its ids: the same logits of real tokens, the same entries, the same XL caches."""
    model = build(**VARIANTS[variant])
    (left, left_memories), (right, right_memories) = (read(model, tokens(ids), lengths=REAL) for ids in (0, 7))
    for (logits, caches), (others, other_caches), real in zip(left, right, REAL, strict=True):
        for row in range(BATCH):
            assert torch.equal(logits[row, : real[row]], others[row, : real[row]])
        assert all(map(torch.equal, caches, other_caches))
    for number, memory, other in zip(model.memorizing_layers, left_memories, right_memories, strict=True):
        cached = model.config["xl_max_memories"] if number in model.xl_memory_layers else 0
        assert memory.lengths.tolist() == (REAL.sum(dim=0) - cached).clamp(min=0).tolist()
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in memory.state_dict().items())


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "upstream's positions"])
def test_a_row_with_padding_reads_as_it_would_alone_without_any(variant):
    """Upstream's positions do not count the XL cache, as wide for one row as for all: there no row is for itself."""
    model = build(**VARIANTS[variant])
    together, memories = read(model, tokens(), lengths=REAL)
    for row in range(BATCH):
        texts = [text[row : row + 1, : real[row]] for text, real in zip(tokens(), REAL, strict=True)]
        alone, own_memories = read(model, texts)
        for (logits, _), (expected, _), real in zip(together, alone, REAL, strict=True):
            assert_close(logits[row, : real[row]], expected[0], SAME_GRAPH)
        for memory, own in zip(memories, own_memories, strict=True):
            held = (entries(memory, row, model.kv_heads), entries(own, 0, model.kv_heads))
            assert_close(*held, SAME_GRAPH)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("way", ["lengths", "mask"])
def test_a_row_without_a_token_in_a_segment_keeps_cache_and_memory(way, shift):
    model = build(xl_max_memories=4, shift_xl_memories_down=shift)
    memories, texts, real = model.create_knn_memories(batch_size=BATCH), tokens(), torch.tensor([0, 4, 4])
    _, xl_memories = model(texts[4], memories)
    said = {"lengths": real} if way == "lengths" else {"mask": torch.arange(LENGTH) < real[:, None]}
    _, after = model(texts[3], memories, xl_memories, **said)
    assert all(torch.equal(new[0], old[0]) for new, old in zip(after, xl_memories, strict=True))
    assert [memory.lengths.tolist() for memory in memories] == [[0, 4, 4]] * 2
    assert after.length.tolist() == [4, 4, 4]
    _, same = model(texts[3][:, :0], memories, after)
    assert all(map(torch.equal, same, after))


def test_the_xl_memories_say_how_much_of_them_each_rows_document_filled():
    results, _ = read(build(xl_max_memories=6), tokens(), lengths=REAL)
    lengths = [xl_memories.length.tolist() for _, xl_memories in results]
    assert lengths == REAL.cumsum(dim=0).clamp(max=6).tolist()


def test_what_they_say_is_what_the_next_segment_takes_for_granted():
    """Until `xl_length` says otherwise; also where the next segment has no padding."""
    model, texts = build(xl_max_memories=10), tokens()
    results, _ = read(model, texts[:2], lengths=REAL[:2])
    xl_memories = results[-1][1]
    plain = [cache.clone() for cache in xl_memories]

    def logits(caches, **options):
        return model(texts[4], model.create_knn_memories(batch_size=BATCH), caches, **options)

    said, after = logits(xl_memories)
    explicit, _ = logits(plain, xl_length=REAL[:2].sum(dim=0))
    assert torch.equal(said, explicit)
    assert after.length.tolist() == (REAL[:2].sum(dim=0) + LENGTH).tolist()
    with pytest.raises(ValueError, match=r"xl_length must be given .* zeros lead all but \[6, 5, 4\] of 8 tokens"):
        logits(plain)
    none, after = logits(xl_memories, xl_length=torch.zeros(BATCH, dtype=torch.int64))
    assert_close(none, logits(None)[0], SAME_GRAPH)
    assert after.length.tolist() == [LENGTH] * BATCH


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_whole_segments_give_the_same_bits_with_lengths_as_without(kv_heads):
    model, texts = build(xl_max_memories=6, kv_heads=kv_heads), tokens()
    (results, memories), (plain, plain_memories) = read(model, texts, lengths=[REAL[4]] * 5), read(model, texts)
    assert type(plain[0][1]) is list
    for (logits, caches), (expected, expected_caches) in zip(results, plain, strict=True):
        assert torch.equal(logits, expected) and all(map(torch.equal, caches, expected_caches))
    for memory, other in zip(memories, plain_memories, strict=True):
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in memory.state_dict().items())


def test_21_6_copies_keep_what_they_say_and_lists_that_lost_it_are_refused():
    model, texts = build(xl_max_memories=6), tokens()
    (_, xl_memories), *_ = read(model, texts[:1], lengths=REAL[:1])[0]
    assert copy.deepcopy(xl_memories).length.tolist() == REAL[0].tolist()
    rebuilt = XLMemories(cache.clone() for cache in xl_memories)
    memories = model.create_knn_memories(batch_size=BATCH)
    with pytest.raises(ValueError, match="xl_length must be given with XL memories that were taken apart"):
        model(texts[1], memories, rebuilt)
    assert [memory.lengths.tolist() for memory in memories] == [[0] * BATCH] * 2
    model(texts[1], memories, rebuilt, xl_length=xl_memories.length)


def moved_by_ddp(caches):
    """As DistributedDataParallel and FSDP1 move the arguments of a call."""
    from torch.distributed.utils import _to_kwargs

    (arguments,), _ = _to_kwargs((caches,), {}, torch.device("cpu"), False)
    return arguments[0]


def stored_and_loaded(caches):
    file = io.BytesIO()
    torch.save(list(caches), file)
    file.seek(0)
    return torch.load(file)


PICKS = [list, tuple, lambda caches: caches[:], copy.copy, copy.deepcopy, moved_by_ddp, stored_and_loaded]


@pytest.mark.parametrize("pick", [*PICKS, lambda caches: pickle.loads(pickle.dumps(caches))])
def test_21_6_the_length_stays_whatever_list_the_caches_are_put_in(pick):
    model, texts = build(xl_max_memories=10), tokens()
    results, _ = read(model, texts[:2], lengths=REAL[:2])
    xl_memories = results[-1][1]
    memories = [model.create_knn_memories(batch_size=BATCH) for _ in range(2)]
    (expected, left), (actual, right) = (
        model(texts[2], of, caches, lengths=REAL[2])
        for of, caches in zip(memories, (xl_memories, pick(xl_memories)), strict=True)
    )
    assert torch.equal(actual, expected) and torch.equal(left.length, right.length)
    for memory, other in zip(*memories, strict=True):
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in memory.state_dict().items())


def test_21_6_caches_that_say_nothing_are_refused_where_rows_differ():
    model, texts = build(xl_max_memories=6), tokens()
    (_, ragged), (_, full) = (
        model(texts[0], model.create_knn_memories(batch_size=BATCH), lengths=lengths) for lengths in (REAL[0], None)
    )
    memories = model.create_knn_memories(batch_size=BATCH)
    for caches in (ragged, full):
        copies = [cache.clone() for cache in caches]
        with pytest.raises(ValueError, match=r"xl_length must be given with xl_memories .* lengths \[4, 1, 3\]"):
            model(texts[1], memories, copies, lengths=REAL[1])
    with pytest.raises(ValueError, match="xl_length must be given with XL memories that were taken apart"):
        model(texts[1], memories, [ragged[0], *(cache.clone() for cache in ragged[1:])], lengths=REAL[1])
    assert [memory.lengths.tolist() for memory in memories] == [[0] * BATCH] * 2
    model(texts[1], memories, list(full), lengths=REAL[1])
    model(texts[1], memories, [cache.clone() for cache in ragged], lengths=REAL[1], xl_length=ragged.length)


COPIES = {
    "clone": lambda cache: cache.clone(),
    "detach": lambda cache: cache.detach(),
    "another dtype": lambda cache: cache.double(),
    "NumPy": lambda cache: torch.from_numpy(cache.numpy().copy()),
    "rows picked": lambda cache: cache[torch.arange(BATCH)],
}
SHORT = {
    "lengths": {"lengths": REAL[0]},
    "all rows alike": {"lengths": torch.full((BATCH,), 2)},
    "padding on the left": {"mask": torch.tensor([[False, False, True, True]]).expand(BATCH, -1)},
    "padding inside": {"mask": torch.tensor([[True, False, True, True]]).expand(BATCH, -1)},
}


@pytest.mark.parametrize("short", SHORT)
@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("kv_heads", [1, 2])
@torch.no_grad()
def test_21_6_copies_that_say_nothing_are_refused_where_a_row_is_not_full(short: str, copied: str, kv_heads: int):
    model, texts = build(xl_max_memories=6, kv_heads=kv_heads), tokens()
    memories = model.create_knn_memories(batch_size=BATCH)
    _, caches = model(texts[4], memories, **SHORT[short])
    copies = [COPIES[copied](cache) for cache in caches]
    with pytest.raises(ValueError, match=r"xl_length must be given with xl_memories .* zeros lead all but"):
        model(texts[1], memories, copies)
    expected, _ = model(texts[1], memories, caches, add_knn_memory=False)
    assert torch.equal(model(texts[1], memories, copies, xl_length=caches.length)[0], expected)
    _, full = model(texts[4], model.create_knn_memories(batch_size=BATCH))
    model(texts[1], model.create_knn_memories(batch_size=BATCH), [COPIES[copied](cache) for cache in full])


@pytest.mark.parametrize("marks", [{"clear_memories_on_sos_token_id": 0}, {"clear_memories_on_eos_token_id": 1}])
@torch.no_grad()
def test_21_6_so_they_are_where_a_document_began_in_the_segment(marks: dict[str, Any]):
    """What is not the row's document is zero in what the model returns."""
    model, texts = build(xl_max_memories=6, **marks), tokens()[4:].repeat(2, 1, 1)
    texts[0, 1, 2] = next(iter(marks.values()))
    memories = model.create_knn_memories(batch_size=BATCH)
    _, caches = model(texts[0], memories)
    with pytest.raises(ValueError, match="zeros lead all but"):
        model(texts[1], memories, [cache.clone() for cache in caches])


@torch.no_grad()
def test_21_6_where_nobody_may_look_copies_are_taken_for_what_they_hold():
    """A compiled model cannot refuse them, no more than one on a GPU, which would wait."""
    torch._dynamo.reset()
    model, texts = build(xl_max_memories=6), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    memories = [model.create_knn_memories(batch_size=BATCH, device="cpu") for _ in range(2)]
    caches = [model(texts[0], of, lengths=REAL[0])[1] for of in memories]
    expected, after = model(texts[1], memories[0], caches[0])
    found, same = compiled(texts[1], memories[1], [cache.clone() for cache in caches[1]])
    assert_close(found, expected, SAME_GRAPH)
    assert same.length.tolist() == after.length.tolist()
    for memory, other in zip(*memories, strict=True):
        assert memory.lengths.tolist() == other.lengths.tolist()
