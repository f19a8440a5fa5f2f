"""Number 5 of the clients' list: one filled memory for many questions, and another device or dtype."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers.checks import SAME_FORMULA, assert_close
from helpers.memories import filled, held, pairs

from memtrans import KNNAttention, KNNMemory, KNNMemoryList, MemorizingTransformer, generate

OPTIONS: dict[str, Any] = {
    "num_tokens": 32, "dim": 16, "depth": 2, "dim_head": 8, "heads": 2, "memorizing_layers": (1, 2),
    "num_retrieved_memories": 3,
}  # fmt: skip


def random_memory(batch: int, kv_heads: int = 1, **kwargs: Any) -> KNNMemory:
    heads = () if kv_heads == 1 else (kv_heads,)
    memory = KNNMemory(4, 9, batch, kv_heads=kv_heads, **kwargs)
    memory.add(torch.randn(batch, *heads, 12, 2, 4))
    return memory


# --------------------------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize(
    ("rows", "documents"), [(6, [0, 0, 1, 1, 2, 2]), ([2, 0, 2], [2, 0, 2]), (torch.tensor(3), [0, 1, 2])]
)
def test_22_5_a_row_of_a_view_finds_what_its_document_finds(kv_heads: int, rows: Any, documents: list[int]) -> None:
    memory = random_memory(3, kv_heads, keep_ids=True)
    view = memory.expand(rows)
    assert (view.num_indices, view.scoped_indices) == (len(documents), list(range(len(documents))))
    assert view.shape == (len(documents), *memory.shape[1:]) and view.device == memory.device
    assert view.lengths.tolist() == memory.lengths[documents].tolist()
    queries = torch.randn(len(documents), 4, 5, 4)
    found = view.search(queries, 3, return_slots=True, return_scores=True)
    ids, entries = view.ids_of(found[2]), view.entries()
    for row, document in enumerate(documents):
        with memory.at_batch_indices([document]):
            alone = memory.search(queries[row, None], 3, return_slots=True, return_scores=True)
            assert all(torch.equal(mine[row], theirs[0]) for mine, theirs in zip(found, alone, strict=True))
            assert torch.equal(ids[row], memory.ids_of(alone[2])[0])
            assert all(torch.equal(mine[row], t[0]) for mine, t in zip(entries, memory.entries(), strict=True))
    with view.at_batch_indices([1]):
        assert torch.equal(view.search(queries[1, None], 3)[0][0], found[0][1])


def test_22_5_a_view_sees_what_the_memory_is_given_later_and_leaves_it_alone() -> None:
    memory = KNNMemory(2, 4, 2)
    view = memory.expand(4)
    assert held(view) == [[]] * 4
    memory.add(pairs(1, batch=2))
    with memory.at_batch_indices([1]):
        memory.add(pairs(2, 3, 4, 5))
    assert held(view) == [[1], [1], [2, 3, 4, 5], [2, 3, 4, 5]]
    memory.load_state_dict(filled().state_dict())
    assert held(view) == [[1, 2, 3]] * 4
    memory.half()
    assert held(view) == [[1, 2, 3]] * 4


@pytest.mark.parametrize(
    "change",
    [
        lambda view: view.add(pairs(4, batch=4)),
        lambda view: view.clear(),
        lambda view: view.clear_rows(torch.ones(4, dtype=torch.bool)),
        lambda view: view.remove(torch.ones(4, 4, dtype=torch.bool)),
        lambda view: view.load_state_dict(filled(4).state_dict()),
        lambda view: view.half(),
        lambda view: pickle.dumps(view),
        lambda view: copy.deepcopy(view),
        lambda view: view.save("nowhere"),
    ],
)
def test_22_5_a_view_is_to_read_alone(change: Any) -> None:
    memory = filled()
    with pytest.raises(TypeError, match=r"got a view .*`expand` made, to read alone"):
        change(memory.expand(4))
    assert held(memory) == [[1, 2, 3]] * 2


@pytest.mark.parametrize("wrong", [3, 0, [0, 2], [-1], [], 2.0])
def test_22_5_rows_that_are_no_documents_are_refused(wrong: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="rows must be"):
        filled().expand(wrong)


def test_22_5_layers_and_models_read_a_view_with_gradients() -> None:
    torch.manual_seed(0)
    model = MemorizingTransformer(**OPTIONS).double()
    memories = model.create_knn_memories(batch_size=1, max_memories=20, dtype=torch.float64)
    with torch.no_grad():
        model(torch.randint(1, 32, (1, 16)), memories)
    questions = torch.randint(1, 32, (3, 5))
    model(questions, memories.expand(3), add_knn_memory=False).square().sum().backward()
    actual = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    for question in questions:
        model(question[None], memories, add_knn_memory=False).square().sum().backward()
    expected = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(actual) == len(expected) > 0
    for mine, theirs in zip(actual, expected, strict=True):
        assert_close(mine, theirs, SAME_FORMULA)
    with pytest.raises(TypeError, match="pass add_knn_memory=False, or give the memory itself"):
        model(questions, memories.expand(3))
    assert memories[0].lengths.tolist() == [16]


def test_22_5_several_questions_are_answered_from_one_document() -> None:
    torch.manual_seed(0)
    model = MemorizingTransformer(**OPTIONS)
    memories = model.create_knn_memories(batch_size=1, max_memories=20)
    with torch.no_grad():
        model(torch.randint(1, 32, (1, 16)), memories)
    questions = torch.randint(1, 32, (3, 5))
    answers = generate(model, questions, tokens=4, segment=16, temperature=0.0, memories=memories.expand(3))
    for question, answer in zip(questions, answers, strict=True):
        alone = generate(model, question[None], tokens=4, segment=16, temperature=0.0, memories=memories)
        assert torch.equal(alone[0], answer)


def test_22_5_the_refusal_of_another_batch_names_the_ways_out() -> None:
    memory, attention = random_memory(1), KNNAttention(dim=8, heads=2, dim_head=4)
    ways = r"; at_batch_indices chooses .*, expand\(rows\) lends"
    for ask in (
        lambda: attention(torch.randn(3, 2, 8), knn_memory=memory),
        lambda: memory.search(torch.randn(3, 2, 4), 2),
        lambda: memory.add(torch.randn(3, 2, 2, 4)),
    ):
        with pytest.raises(ValueError, match=ways):
            ask()
    with pytest.raises(ValueError, match=r"got \(1, 2, 5\)$"):
        memory.search(torch.randn(1, 2, 5), 2)


# -------------------------------------------------------------------------------------------------------------- moving


def test_22_5_half_and_to_store_in_another_dtype_and_give_the_memory_back() -> None:
    memory = filled(keep_ids=True, spare=3)
    memory.clear([0])
    assert memory.half() is memory
    assert (memory.dtype, memory.value_dtype, memory.spare) == (torch.float16, torch.float16, 3)
    assert {memory.state_dict()[name].dtype for name in ("keys", "values")} == {torch.float16}
    assert held(memory) == [[], [1, 2, 3]] and memory.entries().ids[1].tolist() == [0, 1, 2, -1]
    ring = memory._ring
    assert memory.to("cpu", torch.float16)._ring is ring, "nothing to do"
    assert memory.to(torch.zeros(1, dtype=torch.float64)).dtype == memory.half().double().dtype == torch.float64
    assert memory.float().bfloat16().cpu().dtype == torch.bfloat16
    memory.add(pairs(4, batch=2))
    assert held(memory) == [[4], [1, 2, 3, 4]]


def test_22_5_a_memory_that_saw_nothing_yet_can_be_moved() -> None:
    memory = KNNMemory(2, 4).half()
    assert memory.device is None and memory.dtype == torch.float16
    assert memory.to("cpu").device == torch.device("cpu")
    assert memory.state_dict()["values"].dtype == torch.float16


def test_22_5_a_list_moves_all_and_gives_itself_back() -> None:
    memories = KNNMemoryList([filled(), filled()])
    assert memories.half() is memories
    assert [memory.dtype for memory in memories] == [torch.float16] * 2
    assert [held(memory) for memory in memories.to(device="cpu")] == [[[1, 2, 3]] * 2] * 2


@pytest.mark.parametrize("wrong", ["meta", "cuda:99", torch.complex64, torch.int64])
def test_22_5_what_no_memory_can_be_is_refused_and_changes_nothing(wrong: Any) -> None:
    memory = filled()
    with pytest.raises((ValueError, TypeError)):
        memory.to(wrong)
    assert held(memory) == [[1, 2, 3]] * 2 and memory.dtype is None


def test_22_5_a_pending_backward_outlives_a_cast() -> None:
    def gradient(cast: bool) -> torch.Tensor:
        torch.manual_seed(0)
        memory, attention = random_memory(2), KNNAttention(dim=8, heads=2, dim_head=4, num_retrieved_memories=3)
        x = torch.randn(2, 5, 8, requires_grad=True)
        loss = attention(x, knn_memory=memory)[0].square().sum()
        if cast:
            memory.half()
            memory.add(torch.randn(2, 40, 2, 4))
        loss.backward()
        return x.grad

    assert torch.equal(gradient(True), gradient(False))
