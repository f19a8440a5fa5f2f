"""The known faults of memorizing-transformers-pytorch 0.4.1, one test each: what it does, and that memtrans does not.

An exact index stands in for upstream's approximate one, but in fault i, so that only the fault at hand shows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import filelock
import memorizing_transformers_pytorch as upstream
import memorizing_transformers_pytorch.knn_memory as upstream_memory
import pytest
import torch
from helpers.checks import PARITY, assert_close
from torch import Tensor

import memtrans
from memtrans.data.sources import load_corpus
from memtrans.data.stream import NOT_SCORED
from memtrans.training.evaluate import held_out_stream

WIDTH = 16
SMALL = {"num_tokens": 30, "dim": 16, "depth": 3, "dim_head": 8, "heads": 2, "num_retrieved_memories": 4}


@pytest.fixture
def exact_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_memory.faiss, "IndexHNSWFlat", lambda dim, *_: faiss.IndexFlatIP(dim))


@pytest.fixture
def theirs(tmp_path: Path, exact_index: None) -> Callable[..., upstream.KNNMemory]:
    """Makes upstream's memory, below a directory of its own."""

    def make(**kwargs: Any) -> upstream.KNNMemory:
        return upstream.KNNMemory(WIDTH, memmap_filename=str(tmp_path / "memmap"), multiprocessing=False, **kwargs)

    return make


def ours(**kwargs: Any) -> memtrans.KNNMemory:
    return memtrans.KNNMemory(WIDTH, **kwargs)


def segment(*numbers: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, N, 2, D): number i has a key of its own and i everywhere as its value."""
    keys = torch.eye(WIDTH, dtype=dtype)[list(numbers)]
    values = torch.tensor(numbers, dtype=dtype)[:, None].expand(-1, WIDTH)
    return torch.stack((keys, values), dim=1).expand(batch, -1, -1, -1)


def recall(memory: Any, *numbers: int) -> list[list[int]]:
    """What each document in scope answers when asked for the keys of these numbers."""
    queries = torch.eye(WIDTH)[list(numbers)].expand(len(memory.scoped_indices), -1, -1)
    key_values, _ = memory.search(queries, 1)
    return key_values[:, :, 0, 1, 0].int().tolist()


def models(tmp_path: Path, **kwargs: Any) -> tuple[memtrans.MemorizingTransformer, upstream.MemorizingTransformer]:
    """Ours and theirs, with the same parameters."""
    torch.manual_seed(0)
    their_model = upstream.MemorizingTransformer(**{**SMALL, **kwargs}, knn_memories_directory=str(tmp_path / "knn"))
    our_model = memtrans.MemorizingTransformer(**{**SMALL, **kwargs})
    our_model.load_state_dict(their_model.state_dict())
    return our_model, their_model


def tokens(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(5, SMALL["num_tokens"], (batch, length), generator=torch.Generator().manual_seed(1))


def test_fault_a_add_in_a_scope_leaves_other_rows_alone(theirs: Callable[..., Any]) -> None:
    def add_in_a_scope(memory: Any) -> list[list[int]]:
        memory.add(segment(1, 2, batch=2))
        with memory.at_batch_indices([0]):
            memory.add(segment(3))
        memory.add(segment(4, batch=2))
        return recall(memory, 1, 2, 4)

    assert add_in_a_scope(ours(max_memories=8, num_indices=2)) == [[1, 2, 4], [1, 2, 4]]
    assert add_in_a_scope(theirs(max_memories=8, num_indices=2)) == [[1, 2, 4], [1, 2, 0]]


def test_fault_b_a_full_memory_returns_the_value_that_belongs_to_the_key(theirs: Callable[..., Any]) -> None:
    def fill_beyond_capacity(memory: Any) -> list[list[int]]:
        for numbers in ((1, 2, 3), (4, 5, 6), (7,)):
            memory.add(segment(*numbers))
        return recall(memory, 4, 5, 6, 7)

    assert fill_beyond_capacity(ours(max_memories=4)) == [[4, 5, 6, 7]]
    assert fill_beyond_capacity(theirs(max_memories=4)) == [[5, 6, 7, 4]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fault_c_half_precision_goes_in_and_comes_out(theirs: Callable[..., Any], dtype: torch.dtype) -> None:
    def add_and_search(memory: Any) -> Tensor:
        memory.add(segment(1, 2, 3, dtype=dtype))
        return memory.search(torch.eye(WIDTH, dtype=dtype)[None, 2:3], 1)[0]

    found = add_and_search(ours(max_memories=4))
    assert found.dtype == dtype
    assert found[0, 0, 0, 1, 0] == 2
    if dtype == torch.bfloat16:
        with pytest.raises(TypeError, match="BFloat16"):
            add_and_search(theirs(max_memories=4))
    else:
        assert add_and_search(theirs(max_memories=4)).dtype == torch.float32


def test_fault_d_text_is_read_with_current_numpy(tmp_path: Path) -> None:
    """Upstream's training script reads its bytes with `numpy.fromstring`, which numpy 2.3 no longer does."""
    content = bytes(range(256)) * 20
    (tmp_path / "text").write_bytes(content)
    corpus = load_corpus(str(tmp_path / "text"))
    read = torch.cat([document.content for document in (*corpus.train, *corpus.validation)])
    assert bytes(read.tolist()) == content


def test_fault_e_evaluation_reads_every_held_out_document_and_no_other(tmp_path: Path) -> None:
    """Upstream's training script computes its "valid loss" on a training batch."""
    for number in range(40):
        (tmp_path / f"{number}.txt").write_bytes(bytes([number + 1]) * (300 + number))  # one byte value each
    corpus = load_corpus(str(tmp_path))
    held_out = {document.content[0].item(): len(document) - 1 for document in corpus.validation}
    assert 0 < len(held_out) < 20
    assert held_out.keys().isdisjoint(document.content[0].item() for document in corpus.train)
    read: dict[int, int] = {}
    for batch in held_out_stream(corpus.validation, batch=4, segment=64):
        for label in batch.labels[batch.labels != NOT_SCORED].tolist():
            read[label] = read.get(label, 0) + 1
    assert read == held_out


def test_fault_f_the_scope_comes_back_after_an_exception(theirs: Callable[..., Any]) -> None:
    def interrupted(memory: Any) -> list[int]:
        with pytest.raises(KeyboardInterrupt), memory.at_batch_indices([1]):
            raise KeyboardInterrupt
        return memory.scoped_indices

    assert interrupted(ours(max_memories=4, num_indices=2)) == [0, 1]
    assert interrupted(theirs(max_memories=4, num_indices=2)) == [1]


@pytest.mark.parametrize(
    ("token", "kept"), [("clear_memories_on_sos_token_id", [7, 24]), ("clear_memories_on_eos_token_id", [6, 24])]
)
def test_fault_g_start_and_end_tokens_clear_the_documents_that_contain_them(
    tmp_path: Path, exact_index: None, token: str, kept: list[int]
) -> None:
    """Of the segment what comes from a start token on is stored, or behind an end token."""
    our_model, their_model = models(tmp_path, **{token: 2})
    first, second = tokens(), tokens()
    second[0, 5] = 2
    our_memories, their_memories = (model.create_knn_memories(batch_size=2) for model in (our_model, their_model))
    for ids in (first, second):
        our_model(ids, knn_memories=our_memories)
        their_model(ids, knn_memories=their_memories)
    assert our_memories[0].lengths.tolist() == kept
    assert [knn.index.ntotal for knn in their_memories[0].knns] == [24, 24]


def test_fault_h_relative_positions_count_the_xl_cache(tmp_path: Path) -> None:
    """Two segments with a cache that holds the first are one segment of twice the length."""
    length = 12

    def second_half(model: Any) -> tuple[Tensor, Tensor]:
        document, memories = tokens(length=2 * length), model.create_knn_memories(batch_size=2)
        whole, _ = model(document, memories)
        _, xl_memories = model(document[:, :length], memories)
        cached, _ = model(document[:, length:], memories, xl_memories=xl_memories)
        return cached, whole[:, length:]

    our_model, their_model = models(tmp_path, depth=1, memorizing_layers=(), xl_max_memories=length)
    assert_close(*second_half(our_model), PARITY)
    cached, whole = second_half(their_model)
    assert (cached - whole).abs().max() > 0.1


def test_fault_i_search_is_exact(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(3000, WIDTH, generator=generator) * torch.rand(3000, 1, generator=generator)
    queries = torch.randn(1, 100, WIDTH, generator=generator)
    values = torch.arange(3000.0)[:, None].expand_as(keys)
    nearest = (queries[0].double() @ keys.double().T).topk(32, dim=-1).indices

    def found(memory: Any) -> list[set[int]]:
        memory.add(torch.stack((keys, values), dim=1)[None])
        key_values, mask = memory.search(queries, 32)
        return [set(kv[hit][:, 1, 0].int().tolist()) for kv, hit in zip(key_values[0], mask[0], strict=True)]

    expected = [set(row) for row in nearest.tolist()]
    assert found(ours(max_memories=4000)) == expected
    memmap = tmp_path / "memmap"
    their_memory = upstream.KNNMemory(WIDTH, 4000, memmap_filename=str(memmap), multiprocessing=False)
    missed = sum(len(want - got) for want, got in zip(expected, found(their_memory), strict=True))
    assert missed > 0
    assert memmap.exists()  # and it lives in a file


def test_fault_i_no_file_and_no_lock(tmp_path: Path, exact_index: None, monkeypatch: pytest.MonkeyPatch) -> None:
    our_model, their_model = models(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with our_model.knn_memories_context(batch_size=1) as first, our_model.knn_memories_context(batch_size=1) as second:
        our_model(tokens(batch=1), knn_memories=first)
        assert (first[0].lengths.tolist(), second[0].lengths.tolist()) == ([12], [0])
    assert os.listdir(tmp_path / "here") == []
    other_process = filelock.FileLock(tmp_path / "knn" / "mutex")
    with their_model.knn_memories_context(batch_size=1), pytest.raises(filelock.Timeout):
        other_process.acquire(timeout=0)


def test_fault_i_the_memory_has_a_state(theirs: Callable[..., Any]) -> None:
    memory, again = ours(max_memories=4), ours(max_memories=4)
    memory.add(segment(1, 2, 3))
    again.load_state_dict(memory.state_dict())
    assert recall(again, 1, 2, 3) == [[1, 2, 3]]
    assert not hasattr(theirs(max_memories=4), "state_dict")


def three_segments(model: Any) -> Tensor:
    memories, document = model.create_knn_memories(batch_size=2), tokens(length=36)
    return torch.cat([model(part, knn_memories=memories) for part in document.split(12, dim=1)], dim=1)


def test_fault_j_the_memory_shift_changes_what_a_layer_reads(tmp_path: Path, exact_index: None) -> None:
    straight = models(tmp_path, memorizing_layers=(1, 3))
    shifted = models(tmp_path, memorizing_layers=(1, 3), shift_knn_memories_down=1)
    assert torch.equal(three_segments(straight[1]), three_segments(shifted[1])), "upstream's shift changes nothing"
    plain, shifted_logits = three_segments(straight[0]), three_segments(shifted[0])
    assert torch.equal(plain[:, :12], shifted_logits[:, :12])  # nothing is stored yet
    assert (plain - shifted_logits)[:, 12:].abs().max() > 1e-3


def test_fault_j_a_shifted_layer_reads_the_memory_above_and_stores_into_its_own(tmp_path: Path) -> None:
    """Each layer has stored its own keys, and reads as an unshifted model does whose memories are rotated."""
    (straight, _), (shifted, _) = (
        models(tmp_path, memorizing_layers=(1, 2, 3), shift_knn_memories_down=shift) for shift in (0, 1)
    )
    first, second = tokens(length=24).split(12, dim=1)
    memories, expected = (model.create_knn_memories(batch_size=2) for model in (shifted, straight))
    shifted(first, knn_memories=memories)
    straight(first, knn_memories=expected)
    for memory, other in zip(memories, expected, strict=True):
        assert torch.equal(memory.state_dict()["keys"], other.state_dict()["keys"])
    logits = shifted(second, knn_memories=memories, add_knn_memory=False)
    rotated = [*memories[1:], memories[0]]
    assert torch.equal(logits, straight(second, knn_memories=rotated, add_knn_memory=False))
    assert not torch.equal(logits, straight(second, knn_memories=memories, add_knn_memory=False))


def test_fault_j_memory_layers_may_have_another_number_of_heads(tmp_path: Path, exact_index: None) -> None:
    kwargs = {**SMALL, "memorizing_layers": (2,), "knn_attn_heads": 5}
    our_model = memtrans.MemorizingTransformer(**kwargs)
    assert three_segments(our_model).shape == (2, 36, SMALL["num_tokens"])
    their_model = upstream.MemorizingTransformer(**kwargs, knn_memories_directory=str(tmp_path))
    with pytest.raises(RuntimeError, match="must match the size"):
        three_segments(their_model)
