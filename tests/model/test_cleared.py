"""21.5: a row that a host call clears between two segments begins anew, whatever XL caches go on with it.

The oracle is the same model reading the rest of the row as a document of its own.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.checks import SAME_GRAPH, assert_close
from helpers.devices import seeded
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from memtrans import KNNAttention, KNNMemory, KNNMemoryList, MemorizingTransformer
from memtrans.generation.decoder import Decoder
from memtrans.generation.generate import stream
from memtrans.generation.sampling import Sampling

BATCH, N, X = 3, 8, 5
VARIANTS: dict[str, dict[str, Any]] = {
    "a cache shorter than a segment": {},
    "a cache of more than a segment": {"xl_max_memories": 11},
    "a layer without a cache": {"xl_memory_layers": (1, 3)},
    "shifts": {"memorizing_layers": (2, 3), "shift_knn_memories_down": 1, "shift_xl_memories_down": 1},
    "grouped heads, a gate": {"kv_heads": 2, "combine": "gate"},
    "start tokens": {"clear_memories_on_sos_token_id": 0},
}
ROWS = torch.tensor([True, False, True])  # those that are cleared
CALLS: dict[str, Callable[[KNNMemoryList], object]] = {
    "clear_memory": lambda memories: memories.clear_memory([0, 2]),
    "clear_rows": lambda memories: memories.clear_rows(ROWS),
    "each memory's clear": lambda memories: [memory.clear([2, 0]) for memory in memories],
    "each memory's clear_rows": lambda memories: [memory.clear_rows(ROWS) for memory in memories],
    "one after the other": lambda memories: [memories.clear_memory(0), memories.clear_memory(2)],
    "inside a scope": lambda memories: in_scope(memories),
}
on_every_variant = pytest.mark.parametrize("variant", VARIANTS)


def in_scope(memories: KNNMemoryList) -> None:
    with memories.at_batch_indices([2, 0]):
        memories.clear_rows(torch.tensor([True, True]))


def build(**options: Any) -> MemorizingTransformer:
    torch.manual_seed(0)
    small: dict[str, Any] = {"num_tokens": 30, "dim": 16, "depth": 3, "dim_head": 8, "heads": 2, "memorizing_layers": 2}
    small |= {"max_knn_memories": 64, "num_retrieved_memories": 4, "xl_max_memories": X}
    return MemorizingTransformer(**{**small, **options}).eval()


def segments(count: int = 5) -> tuple[Tensor, ...]:
    return torch.randint(2, 30, (BATCH, count * N), generator=seeded(3)).split(N, dim=1)


def memories_of(model: MemorizingTransformer) -> KNNMemoryList:
    return model.create_knn_memories(batch_size=BATCH, device="cpu", spare=4 * N)


def read(model: Any, pieces: Any, memories: KNNMemoryList, caches: Any = None, **options: Any) -> tuple[Tensor, Any]:
    """Logits (B, all tokens, V) of the pieces in their turn, and the caches behind them."""
    logits = []
    for piece in pieces:
        out, caches = model(piece, memories, caches, **options)
        logits.append(out)
    return torch.cat(logits, dim=1), caches


def expected_of(model: MemorizingTransformer, before: int, pieces: Any) -> tuple[Tensor, KNNMemoryList, KNNMemoryList]:
    """Logits of what comes behind `before` segments, new documents in the rows that are cleared; the memories of the
    documents that go on, and of the new ones."""
    going_on, new = memories_of(model), memories_of(model)
    whole, _ = read(model, pieces, going_on)
    alone, _ = read(model, pieces[before:], new)
    return torch.where(ROWS[:, None, None], alone, whole[:, before * N :]), going_on, new


def assert_holds(memories: KNNMemoryList, going_on: KNNMemoryList, new: KNNMemoryList) -> None:
    for memory, old, fresh in zip(memories, going_on, new, strict=True):
        for row, is_new in enumerate(ROWS.tolist()):
            found, wanted = (of.entries() for of in (memory, fresh if is_new else old))
            assert found.mask[row].tolist() == wanted.mask[row].tolist()
            for name in ("keys", "values"):
                assert_close(getattr(found, name)[row], getattr(wanted, name)[row], SAME_GRAPH, f"{name} of row {row}")


@on_every_variant
@pytest.mark.parametrize("call", CALLS)
@torch.no_grad()
def test_21_5_a_cleared_row_reads_on_as_a_document_of_its_own(variant: str, call: str) -> None:
    model, pieces = build(**VARIANTS[variant]), segments()
    expected, going_on, new = expected_of(model, 2, pieces)
    memories = memories_of(model)
    _, caches = read(model, pieces[:2], memories)
    CALLS[call](memories)
    found, _ = read(model, pieces[2:], memories, caches)
    assert_close(found, expected, SAME_GRAPH)
    assert_holds(memories, going_on, new)


@torch.no_grad()
def test_21_5_it_is_so_again_and_again_and_before_anything_left_the_cache() -> None:
    """The first segment leaves nothing in a memory whose cache has room for it: the entries alone would not tell."""
    model, pieces = build(xl_max_memories=11), segments()
    memories, caches = memories_of(model), None
    alone = [read(model, [piece], memories_of(model))[0] for piece in pieces]
    for piece, expected in zip(pieces, alone, strict=True):
        logits, caches = model(piece, memories, caches)
        assert_close(logits, expected, SAME_GRAPH)
        assert memories[0].lengths.tolist() == [0] * BATCH
        memories.clear_memory()


@torch.no_grad()
def test_21_5_what_says_how_long_the_caches_are_does_not_bring_the_old_document_back() -> None:
    model, pieces = build(), segments()
    lengths = torch.full((BATCH,), N)
    expected, _, _ = expected_of(model, 2, pieces)
    memories = memories_of(model)
    _, caches = read(model, pieces[:2], memories, lengths=lengths)
    memories.clear_rows(ROWS)
    found, after = model(pieces[2], memories, caches, xl_length=caches.length)
    assert_close(found, expected[:, :N], SAME_GRAPH)
    assert after.length.tolist() == [X] * BATCH
    memories.clear_rows(ROWS)
    masked, _ = model(pieces[2], memories, caches, mask=torch.ones(BATCH, N, dtype=torch.bool))
    assert_close(masked[ROWS], read(model, pieces[2:3], memories_of(model))[0][ROWS], SAME_GRAPH)


@torch.no_grad()
def test_21_5_a_model_that_reads_alone_sees_no_old_cache_and_goes_on_with_its_new_ones() -> None:
    model, pieces = build(), segments()
    memories = memories_of(model)
    _, caches = read(model, pieces[:2], memories)
    memories.clear_memory()
    found, _ = read(model, pieces[2:], memories, caches, add_knn_memory=False)
    expected, _ = read(model, pieces[2:], memories_of(model), add_knn_memory=False)
    assert_close(found, expected, SAME_GRAPH)
    assert memories[0].lengths.tolist() == [0] * BATCH


@torch.no_grad()
def test_21_5_one_of_several_memories_that_forgets_a_row_is_enough() -> None:
    """The others still answer."""
    model, pieces = build(memorizing_layers=(2, 3)), segments()
    left, right = memories_of(model), memories_of(model)
    caches = [read(model, pieces[:2], memories)[1] for memories in (left, right)]
    left.clear_memory([0, 2], [1])
    right[1].clear([0, 2])
    seen = torch.where(ROWS, 0, X)
    found, _ = model(pieces[2], left, caches[0])
    expected, _ = model(pieces[2], right, caches[1], xl_length=seen)
    assert_close(found, expected, SAME_GRAPH)
    assert left[0].lengths.tolist() == [2 * N - X + (N - X if row else N) for row in ROWS.tolist()]
    assert left[1].lengths.tolist() == [N - X if row else 3 * N - X for row in ROWS.tolist()]


@torch.no_grad()
def test_21_5_models_that_share_a_memory_begin_anew_each_with_its_own_caches() -> None:
    first, second, pieces = build(), build(), segments()
    memories = memories_of(first)
    caches = [model(pieces[0], memories)[1] for model in (first, second)]
    memories.clear_memory()
    alone = memories_of(first)
    for model, of_model in zip((first, second), caches, strict=True):
        found, _ = model(pieces[1], memories, of_model, add_knn_memory=False)
        expected, _ = model(pieces[1], alone, add_knn_memory=False)
        assert_close(found, expected, SAME_GRAPH)


@torch.no_grad()
def test_21_5_caches_go_on_beside_another_memory_and_a_snapshot_of_before() -> None:
    model, pieces = build(), segments()
    memories = memories_of(model)
    _, caches = read(model, pieces[:2], memories)
    before = [memory.snapshot() for memory in memories]
    expected, _ = model(pieces[2], before, caches, add_knn_memory=False)
    beside, _ = model(pieces[2], memories_of(model), caches, add_knn_memory=False)
    memories.clear_memory()
    assert torch.equal(model(pieces[2], before, caches, add_knn_memory=False)[0], expected)
    assert torch.equal(model(pieces[2], memories_of(model), caches, add_knn_memory=False)[0], beside)
    assert not torch.equal(beside, model(pieces[2], memories_of(model), add_knn_memory=False)[0])


@torch.no_grad()
def test_21_5_legacy_keeps_the_cache_in_sight_as_upstream_does() -> None:
    model, pieces = build(legacy=True), segments()
    memories = memories_of(model)
    _, caches = read(model, pieces[:1], memories)
    memories.clear_memory()
    found, _ = model(pieces[1], memories, caches)
    expected, _ = model(pieces[1], memories_of(model), caches)
    assert torch.equal(found, expected)
    assert memories[0].lengths.tolist() == [N] * BATCH


@torch.no_grad()
def test_21_5_caches_that_say_nothing_are_refused_beside_a_memory_that_was_cleared() -> None:
    model, pieces = build(), segments()
    memories = memories_of(model)
    _, caches = read(model, pieces[:2], memories)
    copies = [cache.clone() for cache in caches]
    memories.clear_memory([0])
    with pytest.raises(ValueError, match=r"xl_length must be given .* beside memories that were cleared"):
        model(pieces[2], memories, copies)
    assert int(memories[0].lengths[1]) == 2 * N - X
    _, caches = model(pieces[2], memories, copies, xl_length=torch.tensor([0, X, X]))
    assert memories[0].lengths.tolist() == [N - X, 3 * N - X, 3 * N - X]
    model(pieces[3], memories, [cache.clone() for cache in caches])  # nothing was cleared since


def saved_and_loaded(memories: KNNMemoryList, caches: Any, tmp_path: Any) -> tuple[KNNMemoryList, Any]:
    memories.save(tmp_path / "memories")
    stored = io.BytesIO()
    torch.save(list(caches), stored)
    stored.seek(0)
    return KNNMemoryList.load(tmp_path / "memories"), torch.load(stored)


def by_state(memories: KNNMemoryList, caches: Any, _: Any) -> tuple[KNNMemoryList, Any]:
    model = build()
    fresh = memories_of(model)
    fresh.load_state_dict(memories.state_dict())
    return fresh, copy.deepcopy(caches)


def without_a_device(memories: KNNMemoryList, caches: Any, _: Any) -> tuple[KNNMemoryList, Any]:
    fresh = build().create_knn_memories(batch_size=BATCH)
    fresh.load_state_dict(memories.state_dict())
    return pickle.loads(pickle.dumps(fresh)), caches


SAVED = {
    "files": saved_and_loaded,
    "a state": by_state,
    "a state of a memory that has no device": without_a_device,
    "pickles": lambda memories, caches, _: pickle.loads(pickle.dumps((memories, caches))),
    "copies": lambda memories, caches, _: copy.deepcopy((memories, caches)),
    "moved": lambda memories, caches, _: (memories.to(torch.float64), caches),
}


@pytest.mark.parametrize("way", SAVED)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("rows", [[0, 2], [0, 1, 2]])
@torch.no_grad()
def test_21_5_what_was_saved_knows_of_clearings_before_and_after(
    way: str, when: str, rows: list[int], tmp_path
) -> None:
    model, pieces = build(), segments()
    memories, caches = memories_of(model), None
    _, caches = read(model, pieces[:1], memories)
    memories.clear_memory()
    _, caches = read(model, pieces[:2], memories, caches)
    memories.clear_memory(rows if when == "before" else [])
    memories, caches = SAVED[way](memories, caches, tmp_path)
    memories.clear_memory(rows if when == "after" else [])
    found, _ = model(pieces[2], memories, caches)
    expected, _, _ = expected_of(model, 2, pieces[:3])
    wanted = torch.stack([expected[row] if row in (0, 2) or len(rows) == 2 else found[row] for row in range(BATCH)])
    assert_close(found, wanted, SAME_GRAPH)
    assert memories[0].lengths.tolist() == [N - X if row in rows else 3 * N - X for row in range(BATCH)]


@torch.no_grad()
def test_21_5_what_was_saved_and_not_cleared_goes_on(tmp_path: Any) -> None:
    model, pieces = build(), segments()
    expected, _ = read(model, pieces[:3], memories_of(model))
    for way in SAVED.values():
        memories, caches = memories_of(model), None
        _, caches = read(model, pieces[:1], memories)
        memories.clear_memory()
        _, caches = read(model, pieces[:2], memories, caches)
        memories, caches = way(memories, caches, tmp_path)
        found, _ = model(pieces[2], memories, caches)
        assert_close(found, expected[:, 2 * N :], SAME_GRAPH)


@pytest.mark.parametrize("way", SAVED)
@pytest.mark.parametrize("size", [X, 3 * N])  # of a cache, which has room for all, so that nothing is stored
@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_21_5_caches_that_say_nothing_are_refused_also_beside_what_was_saved_or_moved(
    way: str, size: int, when: str, tmp_path: Any
) -> None:
    model, pieces = build(xl_max_memories=size), segments(3)
    memories = memories_of(model)
    _, caches = read(model, pieces[:2], memories)
    memories.clear_memory([0] if when == "before" else [])
    memories, _ = SAVED[way](memories, caches, tmp_path)
    memories.clear_memory([0] if when == "after" else [])
    with pytest.raises(ValueError, match=r"xl_length must be given .* beside memories that were cleared"):
        model(pieces[2], memories, [cache.clone() for cache in caches])


@torch.no_grad()
def test_21_5_a_memory_that_was_loaded_without_entries_counts_what_it_forgets_before_it_has_a_device(
    tmp_path: Any,
) -> None:
    model, pieces = build(xl_max_memories=3 * N), segments(2)
    memories = memories_of(model)
    _, caches = read(model, pieces[:1], memories)
    memories.save(tmp_path / "memories")
    loaded = KNNMemoryList.load(tmp_path / "memories")
    assert loaded[0].device is None
    loaded[0].clear([0])
    with loaded.at_batch_indices([2]):
        loaded.clear_rows(torch.tensor([True]))
    found, _ = model(pieces[1], loaded, caches)
    expected, _, _ = expected_of(model, 1, pieces)
    assert_close(found, expected, SAME_GRAPH)


@torch.no_grad()
def test_21_5_what_is_moved_knows_that_nothing_was_cleared_since_its_last_segment() -> None:
    model, pieces = build(), segments(3)
    memories = memories_of(model)
    memories.clear_memory()
    _, caches = read(model, pieces[:2], memories)
    model(pieces[2], memories.double(), [cache.clone() for cache in caches])


def test_21_5_compiled_it_is_the_same_and_makes_no_graph_anew() -> None:
    model, pieces = build(), segments(9)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs, dynamic=False)
    ours, theirs = memories_of(model), memories_of(model)
    mine = yours = None
    with torch.no_grad():
        for number, piece in enumerate(pieces):
            made = graphs.frame_count
            found, mine = compiled(piece, ours, mine)
            expected, yours = model(piece, theirs, yours)
            assert_close(found, expected, SAME_GRAPH, f"segment {number}")
            for memories in (ours, theirs):
                memories.clear_rows(ROWS if number % 2 else ~ROWS)
    assert graphs.frame_count == made
    assert ours[0].lengths.tolist() == theirs[0].lengths.tolist()


@pytest.mark.parametrize("recomputed", [False, True])
def test_21_5_gradients_are_those_of_the_documents_alone(recomputed: bool) -> None:
    """A backward pass of the old document is outstanding while the memory is cleared and read on with."""
    model, pieces = build(activation_checkpointing=recomputed).train(), segments(4)
    memories = memories_of(model)
    first, caches = read(model, pieces[:2], memories)
    memories.clear_memory()
    second, _ = read(model, pieces[2:], memories, caches)
    (first.square().sum() + second.square().sum()).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for part in (pieces[:2], pieces[2:]):
        read(model, part, memories_of(model))[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(found[name], parameter.grad, SAME_GRAPH, name)


def test_21_5_a_segment_that_is_recomputed_sees_what_it_saw() -> None:
    model, pieces = build().train(), segments(3)
    memories = memories_of(model)
    _, caches = read(model, pieces[:2], memories)
    memories.clear_memory()
    snapshots = [memory.snapshot() for memory in memories]
    out, after = torch.utils.checkpoint.checkpoint(model, pieces[2], snapshots, caches, use_reentrant=False)
    memories.clear_memory()
    out.square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert memories[0].lengths.tolist() == [0] * BATCH and after.length.tolist() == [X] * BATCH
    model.zero_grad()
    model(pieces[2], memories_of(model))[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(found[name], parameter.grad, SAME_GRAPH, name)


@torch.no_grad()
def test_21_5_a_layer_without_a_model_leaves_the_cache_out_too() -> None:
    torch.manual_seed(0)
    layer = KNNAttention(dim=16, heads=2, dim_head=8, xl_max_memories=X, num_retrieved_memories=4).eval()
    memory, x = KNNMemory(dim=8, max_memories=40, num_indices=BATCH), torch.randn(3, BATCH, N, 16)
    _, cache = layer(x[0], knn_memory=memory)
    memory.clear([0, 2])
    found, cache = layer(x[1], knn_memory=memory, xl_memory=cache)
    alone, _ = layer(x[1], knn_memory=KNNMemory(dim=8, max_memories=40, num_indices=BATCH))
    assert_close(found[ROWS], alone[ROWS], SAME_GRAPH)
    assert not torch.allclose(found[1], alone[1])
    assert memory.lengths.tolist() == [N - X, 2 * N - X, N - X]
    memory.clear()
    layer(x[2], knn_memory=memory, xl_memory=cache, local_length=torch.full((BATCH,), N + X))
    assert memory.lengths.tolist() == [N - X] * BATCH


@pytest.mark.parametrize("copied", [Tensor.clone, Tensor.double, lambda cache: cache[torch.arange(BATCH)]])
@torch.no_grad()
def test_21_5_a_layer_without_a_model_refuses_copies_of_a_cache_beside_a_memory_that_was_cleared(copied: Any) -> None:
    layer = KNNAttention(dim=16, heads=2, dim_head=8, xl_max_memories=X, num_retrieved_memories=4).eval()
    memory, x = KNNMemory(dim=8, max_memories=40, num_indices=BATCH), torch.randn(3, BATCH, N, 16)
    _, cache = layer(x[0], knn_memory=memory)
    _, cache = layer(x[1], knn_memory=memory, xl_memory=copied(cache))  # nothing was cleared yet
    memory.clear([0, 2])
    with pytest.raises(ValueError, match=r"local_length must be given with an xl_memory .* N for rows that begin anew"):
        layer(x[2], knn_memory=memory, xl_memory=copied(cache))
    assert memory.lengths.tolist() == [0, 2 * N - X, 0]
    seen = torch.where(ROWS, N, N + X)
    found, _ = layer(x[2], knn_memory=memory, xl_memory=copied(cache), local_length=seen, add_knn_memory=False)
    assert_close(found, layer(x[2], knn_memory=memory, xl_memory=cache)[0], SAME_GRAPH)


@torch.no_grad()
def test_21_5_a_layers_cache_knows_its_memory_also_where_another_one_is_added_to() -> None:
    layer = KNNAttention(dim=16, heads=2, dim_head=8, xl_max_memories=X, num_retrieved_memories=4).eval()
    memory, other = (KNNMemory(dim=8, max_memories=40, num_indices=BATCH) for _ in range(2))
    x = torch.randn(2, BATCH, N, 16)
    _, cache = layer(x[0], knn_memory=memory)
    memory.clear()
    layer(x[1], knn_memory=memory, xl_memory=cache, add_to=other)
    assert other.lengths.tolist() == [N - X] * BATCH


@on_every_variant
@pytest.mark.parametrize("place", [1, 5, N])
@torch.no_grad()
def test_21_5_a_decoders_row_begins_as_that_of_a_new_decoder(variant: str, place: int) -> None:
    model, text = build(**VARIANTS[variant]), torch.cat(segments(), dim=1)
    decoders = [Decoder(model, BATCH, segment=N) for _ in range(2)]
    fresh = Decoder(model, BATCH, segment=N)
    for decoder in decoders:
        decoder.read(list(text[:, : N + place]))
    decoders[0].memories.clear_memory([0, 2])
    for number in range(N + place, 3 * N + 2):
        found, going_on, new = (decoder.step(text[:, number]) for decoder in (*decoders, fresh))
        assert_close(found, torch.where(ROWS[:, None], new, going_on), SAME_GRAPH, f"token {number}")
    assert_holds(decoders[0].memories, decoders[1].memories, fresh.memories)
    decoders[0].memories.clear_rows(ROWS)
    read_on = decoders[0].read(list(text[:, :11]))
    assert_close(read_on[ROWS], Decoder(model, BATCH, segment=N).read(list(text[:, :11]))[ROWS], SAME_GRAPH)


@torch.no_grad()
def test_21_5_a_stream_goes_on_with_a_new_document_where_its_memory_is_cleared() -> None:
    model, text = build(), torch.cat(segments(2), dim=1)
    decoder, other, fresh = (Decoder(model, BATCH, segment=N) for _ in range(3))
    for one in (decoder, other):
        one.read(list(text[:, :11]))
    tokens, others = (stream(one, 30, Sampling(temperature=0)) for one in (decoder, other))
    last, going_on = next(tokens), next(others)
    decoder.memories.clear_memory([0, 2])
    for _ in range(2 * N + 1):
        new, going_on = next(tokens), next(others)
        expected = torch.where(ROWS, fresh.step(last).argmax(dim=1), going_on)
        assert torch.equal(new, expected)
        last = new
    assert decoder.memories[0].lengths[ROWS].tolist() == fresh.memories[0].lengths[ROWS].tolist()


@torch.no_grad()
def test_21_5_a_decoder_of_legacy_keeps_its_local_context() -> None:
    model, text = build(legacy=True), torch.cat(segments(2), dim=1)
    decoders = [Decoder(model, BATCH, segment=N) for _ in range(2)]
    for decoder in decoders:
        decoder.read(list(text[:, :11]))
    decoders[0].memories.clear_memory()
    decoders[0].step(text[:, 11])
    assert decoders[0].position.tolist() == [4] * BATCH and decoders[0].cached.tolist() == [X] * BATCH


def test_21_5_nothing_is_masked_where_nothing_was_cleared() -> None:
    """The caches of whole segments stay a plain list, for which no kernel is given a length."""
    model, pieces = build(), segments(3)
    memories = memories_of(model)
    memories.clear_memory()
    _, caches = read(model, pieces, memories)
    assert type(caches) is list
