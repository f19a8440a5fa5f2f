"""`KNNMemory` and `KNNMemoryList`: upstream's interface, dtypes, limits, scopes and clearing, and what they refuse."""

from __future__ import annotations

import inspect
import os
import re
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from helpers.memories import filled, held, pairs

from memtrans import KNNMemory, KNNMemoryList

INF = float("inf")

# ------------------------------------------------------------------------------------------------ upstream's interface


def test_the_arguments_are_upstreams_in_upstreams_order() -> None:
    import memorizing_transformers_pytorch.knn_memory as upstream

    for ours, theirs in (
        (KNNMemory.__init__, upstream.KNNMemory.__init__),
        (KNNMemory.add, upstream.KNNMemory.add),
        (KNNMemory.search, upstream.KNNMemory.search),
        (KNNMemory.clear, upstream.KNNMemory.clear),
        (KNNMemory.set_scoped_indices, upstream.KNNMemory.set_scoped_indices),
        (KNNMemory.at_batch_indices, upstream.KNNMemory.at_batch_indices),
        (KNNMemoryList.clear_memory, upstream.KNNMemoryList.clear_memory),
        (KNNMemoryList.at_batch_indices, upstream.KNNMemoryList.at_batch_indices),
        (KNNMemoryList.cleanup, upstream.KNNMemoryList.cleanup),
        (KNNMemoryList.create_memories, upstream.KNNMemoryList.create_memories),
    ):
        names = [name for name in inspect.signature(theirs).parameters if name != "self"]
        assert [name for name in inspect.signature(ours).parameters if name != "self"][: len(names)] == names
    defaults = {name: p.default for name, p in inspect.signature(KNNMemory).parameters.items()}
    assert (defaults["max_memories"], defaults["num_indices"]) == (16000, 1)


def test_the_attributes_of_upstream_stay() -> None:
    memory = KNNMemory(64, 1000, 3)
    assert (memory.dim, memory.max_memories, memory.num_indices) == (64, 1000, 3)
    assert memory.shape == (3, 1000, 2, 64)
    assert memory.scoped_indices == [0, 1, 2]
    assert KNNMemory(64, 1000, 3, kv_heads=2).shape == (3, 2, 1000, 2, 64)


def test_ordinary_use_warns_of_nothing_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memories = KNNMemoryList.create_memories(batch_size=2, num_memory_layers=2)(dim=2, max_memories=4)
        memories[0].add(pairs(1, batch=2))
        memories[0].search(torch.ones(2, 2), 1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("shape", [(2, 3), (2, 5, 3), (2, 4, 5, 3), (2, 1, 2, 2, 3), (2, 0, 3)])
def test_search_keeps_the_shape_of_the_queries(shape: tuple[int, ...]) -> None:
    memory = KNNMemory(3, 8, 2)
    memory.add(torch.randn(2, 4, 2, 3))
    key_values, mask = memory.search(torch.randn(shape), 2)
    assert key_values.shape == (*shape[:-1], 2, 2, 3)
    assert mask.shape == (*shape[:-1], 2)
    assert mask.dtype == torch.bool


def test_heads_search_the_memory_of_their_key_value_head() -> None:
    memory = KNNMemory(2, 4, 1, kv_heads=2)
    memory.add(torch.stack((pairs(1, 2), pairs(3, 4)), dim=1))
    key_values, _ = memory.search(torch.ones(1, 4, 3, 2), 2)  # (B, H, N, D)
    assert key_values.shape == (1, 4, 3, 2, 2, 2)
    assert key_values[0, :, 0, :, 1, 0].tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]


# ---------------------------------------------------------------------------------------------------- device and dtype


def test_the_device_is_the_one_given_or_that_of_the_first_tensor() -> None:
    memory = KNNMemory(2, 4)
    assert memory.device is None
    memory.add(pairs(1))
    assert memory.device == torch.device("cpu")
    assert KNNMemory(2, 4, device="cpu").device == torch.device("cpu")
    with pytest.raises(ValueError, match=r"memory lives on cpu, got a tensor on meta: memory.to\('meta'\) moves it"):
        memory.add(pairs(1).to("meta"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_storage_is_float32_on_the_cpu_and_results_are_in_the_queries_dtype(dtype: torch.dtype) -> None:
    memory = KNNMemory(2, 4)
    memory.add(pairs(1, 2, dtype=dtype))
    key_values, _ = memory.search(torch.ones(1, 1, 2, dtype=dtype), 2)
    assert key_values.dtype == dtype
    assert key_values[0, 0, :, 1, 0].tolist() == [1, 2]
    state = memory.state_dict()
    assert (state["keys"].dtype, state["values"].dtype) == (torch.float32, torch.float32)


def test_dtype_and_value_dtype_choose_the_storage() -> None:
    memory = KNNMemory(2, 4, dtype=torch.float16)
    memory.add(pairs(1))
    assert (memory.state_dict()["keys"].dtype, memory.state_dict()["values"].dtype) == (torch.float16, torch.float16)
    memory = KNNMemory(2, 4, dtype=torch.float64, value_dtype=torch.bfloat16)
    for _ in range(2):  # empty, then filled
        state = memory.state_dict()
        assert (state["keys"].dtype, state["values"].dtype) == (torch.float64, torch.bfloat16)
        memory.add(pairs(1))


def test_values_saturate_and_keys_that_are_not_finite_are_never_retrieved() -> None:
    memory = KNNMemory(2, 4, dtype=torch.float16)
    memory.add(pairs(1e6, -1e6, INF))
    assert held(memory) == [[65504, -65504, 65504]]
    memory.add(torch.tensor([[[[INF, 1.0], [8.0, 8.0]]]]))
    assert held(memory) == [[65504, -65504, 65504]]
    assert memory.lengths.tolist() == [4]


def test_the_memory_is_never_differentiated() -> None:
    memory = KNNMemory(2, 4)
    memory.add(pairs(1).clone().requires_grad_())
    key_values, mask = memory.search(torch.ones(1, 2, requires_grad=True), 1)
    assert not key_values.requires_grad
    assert not mask.requires_grad


def test_what_was_returned_stays_whatever_is_added_later() -> None:
    memory = filled(1)
    key_values, _ = memory.search(torch.ones(1, 2), 3)
    state, before = memory.state_dict(), key_values.clone()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    memory.add(pairs(*range(10, 30)))
    assert torch.equal(key_values, before)
    assert all(torch.equal(state[name], kept[name]) for name in kept)


# ------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("capacity", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("spare", [0, 2])
def test_the_newest_memories_stay(capacity: int, spare: int) -> None:
    """A capacity of 1, a segment longer than the memory, and many short ones."""
    for segments in ([range(9)], [range(3), range(3, 9)], [[number] for number in range(9)]):
        memory = KNNMemory(2, capacity, spare=spare)
        for segment in segments:
            memory.add(pairs(*segment))
        assert held(memory) == [list(range(9))[-capacity:]]


def test_fewer_than_k_are_padded_with_zeros_and_a_false_mask() -> None:
    memory = filled(1, max_memories=2)
    for topk in (3, 50):  # more than it holds, more than it can hold
        key_values, mask = memory.search(torch.ones(1, 2), topk)
        assert mask.tolist() == [[True, True] + [False] * (topk - 2)]
        assert (key_values[0, 2:] == 0).all()


def test_an_empty_memory_finds_nothing() -> None:
    for memory in (KNNMemory(2, 4, 2), KNNMemory(2, 4, 2, device="cpu"), filled()):
        memory.clear()
        key_values, mask = memory.search(torch.ones(2, 5, 2), 3)
        assert not mask.any()
        assert (key_values == 0).all()
        assert memory.lengths.tolist() == [0, 0]


def test_an_empty_segment_adds_nothing() -> None:
    memory = filled(1)
    memory.add(pairs())
    memory.add(pairs(7, 8), count=torch.tensor([0]))
    assert held(memory) == [[1, 2, 3]]


def test_spare_grows_to_the_longest_segment_and_content_stays() -> None:
    memory = KNNMemory(2, 4, spare=2)
    memory.add(pairs(1, 2, 3, 4, 5))
    assert memory.spare == 5
    memory.add(pairs(*range(6, 16)))
    assert (memory.spare, held(memory)) == (10, [[12, 13, 14, 15]])
    memory.add(pairs(16))
    assert (memory.spare, held(memory)) == (10, [[13, 14, 15, 16]])


# ------------------------------------------------------------------------------------------------- scopes and clearing


def test_a_scope_picks_documents_in_its_order() -> None:
    memory = filled(3)
    with memory.at_batch_indices([2, 0]) as same:
        assert same is memory
        assert memory.scoped_indices == [2, 0]
        memory.add(torch.cat((pairs(20), pairs(30))))
        assert held(memory) == [[1, 2, 3, 20], [1, 2, 3, 30]]
    assert memory.scoped_indices == [0, 1, 2]
    assert held(memory) == [[1, 2, 3, 30], [1, 2, 3], [1, 2, 3, 20]]


def test_scopes_nest_and_come_back_after_an_exception() -> None:
    memories = KNNMemoryList([filled(3), filled(3)])
    with memories.at_batch_indices([0, 1]):
        with pytest.raises(KeyError), memories.at_batch_indices([1]):
            raise KeyError
        assert [memory.scoped_indices for memory in memories] == [[0, 1], [0, 1]]
    assert [memory.scoped_indices for memory in memories] == [[0, 1, 2], [0, 1, 2]]


def test_a_refused_scope_leaves_the_old_one_in_every_memory() -> None:
    memories = KNNMemoryList([filled(3), filled(2)])
    with pytest.raises(ValueError, match=r"\[0, 2\), got \[2\]"), memories.at_batch_indices([2]):
        pass
    assert [memory.scoped_indices for memory in memories] == [[0, 1, 2], [0, 1]]


@pytest.mark.parametrize("indices", [[0, 0], [3], [-1], torch.tensor([1, 1])])
def test_repeated_and_out_of_range_indices_are_refused(indices: Any) -> None:
    memory = filled(3)
    shown = [int(index) for index in indices]
    for call, name in ((memory.set_scoped_indices, "indices"), (memory.clear, "batch_indices")):
        message = f"{name} must be different numbers in [0, 3), got {shown}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            call(indices)
    assert held(memory) == [[1, 2, 3]] * 3


def test_a_scope_of_no_document_is_refused() -> None:
    memory = filled(3)
    with pytest.raises(ValueError, match=r"indices must name at least one document, got \[\]"):
        memory.set_scoped_indices([])
    assert memory.scoped_indices == [0, 1, 2]


@pytest.mark.parametrize("indices", [[1], 1, (1,), torch.tensor([1])])
def test_clear_is_absolute_inside_a_scope(indices: Any) -> None:
    memory = filled(3)
    with memory.at_batch_indices([2, 1]):
        memory.clear(indices)
        assert memory.scoped_indices == [2, 1]
    assert held(memory) == [[1, 2, 3], [], [1, 2, 3]]
    memory.add(pairs(9, batch=3))
    assert held(memory) == [[1, 2, 3, 9], [9], [1, 2, 3, 9]]


def test_clear_without_indices_is_everything_even_inside_a_scope() -> None:
    memory = filled(3)
    with memory.at_batch_indices([1]):
        memory.clear()
    assert held(memory) == [[], [], []]


def test_clear_rows_is_relative_to_the_scope() -> None:
    memory = filled(3)
    memory.clear_rows(torch.tensor([False, True, False]))
    with memory.at_batch_indices([2, 0]):
        memory.clear_rows(torch.tensor([True, False]))
    assert held(memory) == [[1, 2, 3], [], []]
    assert memory.lengths.tolist() == [3, 0, 0]


def test_a_list_clears_the_memories_and_documents_named() -> None:
    memories = KNNMemoryList([filled(), filled(), filled()])
    memories.clear_memory([0], memory_indices=[0, 2])
    assert [memory.lengths.tolist() for memory in memories] == [[0, 3], [3, 3], [0, 3]]
    memories.clear_rows(torch.tensor([False, True]))
    assert [memory.lengths.tolist() for memory in memories] == [[0, 0], [3, 0], [0, 0]]
    memories.clear_memory()
    assert [memory.lengths.tolist() for memory in memories] == [[0, 0]] * 3


def test_21_11_cleanup_leaves_the_memories_readable_and_clear_empties_them() -> None:
    memories = KNNMemoryList([filled()])
    memories.cleanup()
    memories[0].cleanup()
    assert held(memories[0]) == [[1, 2, 3]] * 2
    memories[0].add(pairs(5, batch=2))
    assert held(memories[0]) == [[1, 2, 3, 5]] * 2
    memories[0].clear()
    assert held(memories[0]) == [[], []]


def test_21_11_storage_goes_with_the_last_reference() -> None:
    memory = filled()
    storage = weakref.ref(memory._ring)
    memory.cleanup()
    del memory
    assert storage() is None


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"max_memories": 0}, ValueError, "max_memories must be at least 1, got 0"),
        ({"num_indices": -1}, ValueError, "num_indices must be at least 1, got -1"),
        ({"kv_heads": 0}, ValueError, "kv_heads must be at least 1, got 0"),
        ({"spare": -1}, ValueError, "spare must be at least 0, got -1"),
        ({"backend": "gpu"}, ValueError, "backend must be one of auto, .*got 'gpu'"),
        ({"dtype": torch.int32}, TypeError, "^dtype must be one of torch.float32, .*, got torch.int32"),
        ({"dtype": "float16"}, TypeError, "^dtype must be one of torch.float32, .*, got 'float16'"),
        ({"value_dtype": torch.float8_e5m2}, TypeError, "value_dtype must be one of .*, got torch.float8_e5m2"),
        ({"dim": 4.0}, TypeError, "dim must be an integer, got 4.0"),
        ({"max_memories": "8"}, TypeError, "max_memories must be an integer, got '8'"),
        ({"num_indices": True}, TypeError, "num_indices must be an integer, got True"),
        ({"kv_heads": 2.0}, TypeError, "kv_heads must be an integer, got 2.0"),
        ({"spare": None}, TypeError, "spare must be an integer, got None"),
        ({"device": "meta"}, ValueError, "device must be one that keeps values, got 'meta'"),
        ({"device": "abacus"}, ValueError, "device must be one that this torch can use, got 'abacus': "),
    ],
)
def test_a_memory_that_cannot_be_is_refused(kwargs: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        KNNMemory(**{"dim": 2, "max_memories": 4, **kwargs})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m: m.add(torch.ones(2, 3, 2, 5)),
            ValueError,
            r"memories must have shape \(2, N, 2, 2\).*\(2, 3, 2, 5\)",
        ),
        (lambda m: m.add(torch.ones(3, 1, 2, 2)), ValueError, r"memories must .* for 2 documents .*\(3, 1, 2, 2\)"),
        (lambda m: m.add(torch.ones(2, 3, 3, 2)), ValueError, r"memories must have shape .* got \(2, 3, 3, 2\)"),
        (lambda m: m.add(torch.ones(2, 2)), ValueError, r"memories must have shape .* got \(2, 2\)"),
        (lambda m: m.add(torch.ones(2, 1, 2, 2).long()), TypeError, "memories must be floating point, got torch.int64"),
        (lambda m: m.add(torch.ones(2, 1, 2, 2), torch.tensor([1])), ValueError, r"count must have shape .*got \(1,\)"),
        (lambda m: m.add(torch.ones(2, 1, 2, 2), torch.tensor([2, 0])), ValueError, r"count must be in \[0, 1\], got"),
        (lambda m: m.search(torch.ones(2, 3), 1), ValueError, r"queries must have shape \(2, ..., 2\) .* got \(2, 3\)"),
        (lambda m: m.search(torch.ones(3, 2), 1), ValueError, r"queries must .* 2 documents in scope, got \(3, 2\)"),
        (lambda m: m.search(torch.ones(2, 2).int(), 1), TypeError, "queries must be floating point, got torch.int32"),
        (lambda m: m.search(torch.ones(2, 2), 0), ValueError, "topk must be at least 1, got 0"),
        (lambda m: m.search(torch.full((2, 2), INF), 1), ValueError, "queries must be finite, got infinite or NaN"),
        (lambda m: m.search(torch.ones(2, 2), 2.0), TypeError, "topk must be an integer, got 2.0"),
        (lambda m: m.search(numpy.ones((2, 2)), 1), TypeError, "queries must be a torch.Tensor, got ndarray"),
        (lambda m: m.add(numpy.ones((2, 1, 2, 2))), TypeError, "memories must be a torch.Tensor, got ndarray"),
        (lambda m: m.add(None), TypeError, "memories must be a torch.Tensor, got NoneType"),
        (lambda m: m.add(torch.ones(2, 1, 2, 2), [1, 1]), TypeError, "count must be a torch.Tensor, got list"),
        (lambda m: m.clear_rows([True, False]), TypeError, "mask must be a torch.Tensor, got list"),
        (lambda m: m.clear(1.0), TypeError, "batch_indices must be an integer, got 1.0"),
        (
            lambda m: m.clear(torch.tensor([True, False])),
            TypeError,
            r"batch_indices must be an integer, got tensor\(True",
        ),
        (lambda m: m.set_scoped_indices(1), TypeError, "indices must be a sequence of numbers of documents, got 1"),
        (lambda m: m.set_scoped_indices(torch.tensor(1)), TypeError, r"indices must be a sequence .* got tensor\(1\)"),
        (lambda m: m.set_scoped_indices([0.0]), TypeError, "indices must be an integer, got 0.0"),
        (lambda m: m.clear_rows(torch.ones(3).bool()), ValueError, r"mask must be a bool tensor of shape \(2,\), got"),
        (lambda m: m.clear_rows(torch.ones(2)), ValueError, "mask must be a bool tensor .* got torch.float32"),
    ],
)
def test_bad_tensors_are_refused_and_nothing_is_lost(
    call: Callable[[KNNMemory], None], error: type[Exception], message: str
) -> None:
    memory = filled()
    with pytest.raises(error, match=message):
        call(memory)
    assert held(memory) == [[1, 2, 3], [1, 2, 3]]


@pytest.mark.parametrize("shape", [(2, 2), (2, 3, 2), (2, 3, 5, 2)])
def test_query_heads_must_be_a_multiple_of_the_key_value_heads(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"queries must have shape .* H a multiple of kv_heads=2, got"):
        KNNMemory(2, 4, 2, kv_heads=2).search(torch.ones(shape), 1)


def test_sizes_and_counts_may_be_any_kind_of_integer() -> None:
    memory = KNNMemory(numpy.int64(2), numpy.int32(4), torch.tensor(1))
    memory.add(pairs(1, 2))
    assert memory.shape == (1, 4, 2, 2)
    for topk in (numpy.int64(3), torch.tensor(3)):
        assert memory.search(torch.ones(1, 2), topk)[1].tolist() == [[True, True, False]]


def test_a_memory_takes_no_place_on_a_device_that_keeps_nothing() -> None:
    with pytest.raises(ValueError, match="device must be one that keeps values, got 'meta'"):
        KNNMemory(2, 4).add(pairs(1).to("meta"))


def test_a_list_names_the_memories_that_it_does_not_hold() -> None:
    memories = KNNMemoryList([filled()])
    with pytest.raises(IndexError, match=r"memory_indices must be in \[0, 1\), got \[0, 3\]"):
        memories.clear_memory(memory_indices=[0, 3])
    with pytest.raises(TypeError, match="memory_indices must be a sequence of numbers of memories, got 0"):
        memories.clear_memory([0], 0)
    with pytest.raises(TypeError, match="state must be a mapping of names to tensors, got list"):
        memories.load_state_dict([1])
    with pytest.raises(TypeError, match="indices must be a sequence of numbers of documents, got 1"):
        memories.at_batch_indices(1).__enter__()
    assert memories[0].lengths.tolist() == [3, 3]
    with pytest.raises(TypeError, match=r"num_memory_layers must be an integer, got 2\.0"):
        KNNMemoryList.create_memories(batch_size=2, num_memory_layers=2.0)


def test_a_list_tells_every_memory_of_documents_that_can_be_gone_through_once() -> None:
    memories = KNNMemoryList([filled(), filled()])
    memories.clear_memory(number for number in (0,))
    assert [memory.lengths.tolist() for memory in memories] == [[0, 3], [0, 3]]


@pytest.mark.parametrize("index", [1, torch.tensor(1), numpy.int64(1)])
def test_clear_takes_any_kind_of_integer(index: Any) -> None:
    memory = filled(3)
    memory.clear(index)
    assert held(memory) == [[1, 2, 3], [], [1, 2, 3]]


def test_a_value_that_is_not_a_number_is_refused_and_a_key_is_stored_but_never_found() -> None:
    memory, memories = KNNMemory(2, 4), torch.ones(1, 1, 2, 2)
    memories[..., 1, 0] = float("nan")
    with pytest.raises(ValueError, match="the values in memories must be numbers, got NaN components"):
        memory.add(memories)
    assert memory.lengths.tolist() == [0]
    memory.add(memories.flip(-2))
    assert memory.lengths.tolist() == [1]
    assert not memory.search(torch.ones(1, 1, 2), 1)[1].any()
