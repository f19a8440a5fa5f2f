"""Number 6 of the clients' list: what a search found, ids beside the entries, and entries that are removed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.checks import SAME_FORMULA, assert_close
from helpers.devices import seeded
from helpers.memories import filled, held, pairs
from helpers.processes import Processes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memtrans import KNNAttention, KNNMemory, KNNMemoryList, MemorizingTransformer, join_shards
from memtrans_kernels import StaleMemoryError

BEFORE = Path(__file__).parents[1] / "fixtures" / "before_rooms"


def with_ids(batch: int = 2, **kwargs: Any) -> KNNMemory:
    return filled(batch, keep_ids=True, **kwargs)


def ids(memory: KNNMemory) -> list[list[int]]:
    """The ids of what each document in scope holds, old to new."""
    entries = memory.entries()
    return [of_document[there].tolist() for of_document, there in zip(entries.ids, entries.mask, strict=True)]


def values(memory: KNNMemory) -> list[list[float]]:
    entries = memory.entries()
    return [of_document[there][:, 0].tolist() for of_document, there in zip(entries.values, entries.mask, strict=True)]


def found_ids(memory: KNNMemory, topk: int = 9) -> list[list[int]]:
    """The ids that a search gives, old to new, as equal keys come."""
    _, mask, slots = memory.search(torch.ones(len(memory.scoped_indices), 1, 2), topk, return_slots=True)
    asked = memory.ids_of(slots)
    assert (asked[~mask] == -1).all()
    return [of_document[0][there[0]].tolist() for of_document, there in zip(asked, mask, strict=True)]


# ------------------------------------------------------------------------------------------------------ what was found


def test_22_6_search_says_where_entries_are_and_how_well_they_fit() -> None:
    memory = KNNMemory(2, 4, keep_ids=True)
    memory.add(torch.tensor([[[[1.0, 0.0], [5.0, 5.0]], [[3.0, 0.0], [6.0, 6.0]]]]))
    query = torch.tensor([[2.0, 0.0]])
    key_values, mask, slots, scores = memory.search(query, 3, return_slots=True, return_scores=True)
    assert (slots.tolist(), scores.tolist()) == ([[1, 0, -1]], [[6.0, 2.0, -torch.inf]])
    assert mask.tolist() == [[True, True, False]] and key_values[0, :, 1, 0].tolist() == [6.0, 5.0, 0.0]
    assert torch.equal(memory.search(query, 3, return_scores=True)[2], scores)
    assert torch.equal(memory.search(query, 3, return_slots=True)[2], slots)
    assert len(memory.search(query, 3)) == 2


def test_22_6_slots_have_the_shape_of_the_queries_and_ids_of_the_slots() -> None:
    memory = KNNMemory(2, 4, 2, kv_heads=2, keep_ids=True)
    memory.add(torch.randn(2, 2, 3, 2, 2))
    _, _, slots, scores = memory.search(torch.randn(2, 4, 5, 7, 2), 2, return_slots=True, return_scores=True)
    assert slots.shape == scores.shape == memory.ids_of(slots).shape == (2, 4, 5, 7, 2)
    for wrong in (slots[:1], slots[:, :3], slots.float(), slots + 7, slots - 2):
        with pytest.raises((TypeError, ValueError), match="slots must"):
            memory.ids_of(wrong)


# ----------------------------------------------------------------------------------------------------------------- ids


def test_22_6_ids_are_positions_in_the_document_and_outlive_what_is_dropped() -> None:
    memory = with_ids(spare=2)
    memory.add(pairs(4, 5, batch=2))
    assert ids(memory) == found_ids(memory) == [[1, 2, 3, 4]] * 2
    memory.clear([0])
    memory.add(pairs(6, batch=2), torch.tensor([1, 0]))
    assert ids(memory) == found_ids(memory) == [[0], [1, 2, 3, 4]]
    with memory.at_batch_indices([1]):
        memory.add(pairs(7, 8, 9, 10, 11, 12, 13))
        assert ids(memory) == found_ids(memory) == [[8, 9, 10, 11]]


def test_22_6_ids_that_are_given_come_back_in_every_head() -> None:
    memory = KNNMemory(2, 3, 2, kv_heads=2, keep_ids=True)
    memory.add(torch.randn(2, 2, 4, 2, 2), ids=torch.tensor([[7, 6, 5, 4], [-3, 2**62, 0, 1]]))
    assert ids(memory) == [[6, 5, 4], [2**62, 0, 1]]
    _, _, slots = memory.search(torch.randn(2, 4, 1, 2), 3, return_slots=True)
    assert memory.ids_of(slots).sort(dim=-1).values[0].tolist() == [[[4, 5, 6]]] * 4


def test_22_6_ids_that_nobody_keeps_are_refused_and_cost_nothing() -> None:
    memory, (_, _, slots) = filled(), filled().search(torch.ones(2, 1, 2), 2, return_slots=True)
    with pytest.raises(ValueError, match="keep_ids must be True for ids to be stored, got ids and keep_ids=False"):
        memory.add(pairs(1, batch=2), ids=torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="keep_ids must be True for the ids of entries to be known, got False"):
        memory.ids_of(slots)
    assert memory.entries().ids is None and memory._ring.ids is None
    assert set(memory.state_dict()) == {"keys", "values", "lengths"} and "keep_ids" not in memory.configuration()


@pytest.mark.parametrize("wrong", [torch.zeros(2, 2).long(), torch.zeros(1, 3).long(), torch.zeros(2, 3).int()])
def test_22_6_ids_of_another_shape_or_dtype_are_refused(wrong: Tensor) -> None:
    memory = with_ids()
    with pytest.raises((ValueError, TypeError), match="ids must"):
        memory.add(pairs(4, 5, 6, batch=2), ids=wrong)
    assert ids(memory) == [[0, 1, 2]] * 2


def test_22_6_ids_are_kept_in_files_states_pickles_and_copies(tmp_path: Path) -> None:
    memory = with_ids()
    memory.add(pairs(4, 5, batch=2), ids=torch.tensor([[70, 71], [80, 81]]))
    memory.clear([0])
    memory.add(pairs(6, batch=2))
    memory.save(tmp_path / "one")
    KNNMemoryList([memory]).save(tmp_path / "list")
    other = KNNMemory(2, 9, 2, keep_ids=True)
    other.load_state_dict(memory.state_dict())
    copies = [
        KNNMemory.load(tmp_path / "one"),
        KNNMemoryList.load(tmp_path / "list")[0],
        pickle.loads(pickle.dumps(memory)),
        copy.deepcopy(memory),
        other,
    ]
    for loaded in copies:
        assert ids(loaded) == [[0], [2, 80, 81, 5]] and loaded.keep_ids
        loaded.add(pairs(7, batch=2))
        assert ids(loaded)[0] == [0, 1] and ids(loaded)[1][-2:] == [5, 6]
    smaller = KNNMemory.load(tmp_path / "one", max_memories=2)
    assert ids(smaller) == [[0], [81, 5]]
    none = KNNMemory.load(tmp_path / "one", keep_ids=False)
    assert none.entries().ids is None and held(none) == held(memory)


def test_22_6_old_files_load_with_and_without_ids() -> None:
    memory = KNNMemory.load(BEFORE / "memory.safetensors")
    assert not memory.keep_ids and int(memory.lengths.max()) > 0
    numbered = KNNMemory.load(BEFORE / "memory.safetensors", keep_ids=True)
    assert ids(numbered) == [list(range(length)) for length in memory.lengths.tolist()]
    memories = KNNMemoryList.load(BEFORE / "memories.safetensors", keep_ids=True)
    assert [ids(of_layer) for of_layer in memories] == [
        [list(range(length)) for length in of_layer.lengths.tolist()] for of_layer in memories
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(2, 2).long()}, r"ids of shape \(2, 3\)"),
        ({"positions": torch.zeros(3).long()}, r"positions of shape \(2,\)"),
        ({"ids": torch.zeros(2, 3)}, "ids must be torch.int64"),
    ],
)
def test_22_6_a_state_with_other_ids_is_refused(change: dict[str, Tensor], message: str) -> None:
    memory = with_ids()
    with pytest.raises((ValueError, TypeError), match=message):
        memory.load_state_dict({**memory.state_dict(), **change})
    assert ids(memory) == [[0, 1, 2]] * 2


def test_22_6_lists_and_models_pass_keep_ids_on() -> None:
    memories = KNNMemoryList.create_memories(batch_size=2, num_memory_layers=2)(dim=2, max_memories=4, keep_ids=True)
    assert all(memory.keep_ids for memory in memories)
    model = MemorizingTransformer(num_tokens=32, dim=16, depth=2, dim_head=8, heads=2, memorizing_layers=(1, 2))
    memories = model.create_knn_memories(batch_size=2, max_memories=9, keep_ids=True)
    for _ in range(2):
        model(torch.randint(1, 32, (2, 6)), memories)
    assert [ids(memory) for memory in memories] == [[list(range(3, 12))] * 2] * 2


def test_22_6_a_document_that_begins_inside_a_segment_is_numbered_from_its_start_token() -> None:
    model = MemorizingTransformer(
        num_tokens=32, dim=16, depth=1, dim_head=8, heads=2, memorizing_layers=1, clear_memories_on_sos_token_id=1
    )
    memories = model.create_knn_memories(batch_size=2, max_memories=20, keep_ids=True)
    tokens = torch.full((2, 6), 5)
    model(tokens, memories)
    tokens[1, 2] = 1
    model(tokens, memories)
    assert [of_document[-1] for of_document in ids(memories[0])] == [11, 3]


def test_22_6_recomputing_and_compiling_store_the_same_ids() -> None:
    torch.manual_seed(0)
    attention = KNNAttention(dim=8, heads=2, dim_head=4, num_retrieved_memories=3)
    memories = [KNNMemory(4, 6, 2, spare=8, device="cpu", keep_ids=True) for _ in range(3)]
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    for length in (4, 3, 4):
        x = torch.randn(2, length, 8, requires_grad=True)
        attention(x, knn_memory=memories[0])[0].sum().backward()
        snapshot = memories[1].snapshot(longest=length)
        checkpoint(
            lambda x, snapshot: attention(x, knn_memory=snapshot)[0], x, snapshot, use_reentrant=False
        ).sum().backward()
        compiled(x, knn_memory=memories[2])[0].sum().backward()
    for memory in memories:
        assert ids(memory) == [list(range(5, 11))] * 2


def test_22_6_ids_follow_a_ring_that_is_laid_out_anew() -> None:
    memory = with_ids(spare=1)
    memory.add(pairs(*range(4, 16), batch=2))
    assert ids(memory) == found_ids(memory) == [[11, 12, 13, 14]] * 2


# ------------------------------------------------------------------------------------------------------------- removal


def remove(memory: KNNMemory, *places: tuple[int, int]) -> None:
    mask = torch.zeros(len(memory.scoped_indices), memory.max_memories, dtype=torch.bool)
    for document, place in places:
        mask[document, place] = True
    memory.remove(mask)


@pytest.mark.parametrize("spare", [0, 1, 5])
def test_22_6_what_is_removed_is_not_found_not_counted_and_not_saved(tmp_path: Path, spare: int) -> None:
    memory = with_ids(spare=spare)
    memory.add(pairs(4, 5, batch=2))  # 2 3 4 5
    remove(memory, (0, 0), (0, 2), (1, 3))
    for same in (memory, pickle.loads(pickle.dumps(memory))):
        assert held(same) == values(same) == [[3, 5], [2, 3, 4]]
        assert ids(same) == found_ids(same) == [[2, 4], [1, 2, 3]]
        assert same.lengths.tolist() == [2, 3]
    memory.save(tmp_path / "memory")
    loaded = KNNMemory.load(tmp_path / "memory")
    for same in (memory, loaded):
        same.add(pairs(6, 7, batch=2))
        assert held(same) == [[3, 5, 6, 7], [3, 4, 6, 7]]
        assert ids(same) == [[2, 4, 5, 6], [2, 3, 5, 6]]


def test_22_6_removal_speaks_of_the_documents_in_scope() -> None:
    memory = with_ids(3)
    with memory.at_batch_indices([2, 0]):
        remove(memory, (0, 1))
    assert held(memory) == [[1, 2, 3], [1, 2, 3], [1, 3]]


def test_22_6_everything_can_be_removed_and_nothing_too() -> None:
    memory = filled()
    memory.remove(torch.zeros(2, 4, dtype=torch.bool))
    assert held(memory) == [[1, 2, 3]] * 2
    memory.remove(torch.ones(2, 4, dtype=torch.bool))
    assert held(memory) == [[], []] and memory.lengths.tolist() == [0, 0]
    KNNMemory(2, 4, 2).remove(torch.ones(2, 4, dtype=torch.bool))


@pytest.mark.parametrize(
    "wrong", [torch.ones(2, 3, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool), torch.ones(2, 4)]
)
def test_22_6_another_mask_is_refused(wrong: Tensor) -> None:
    memory = filled()
    with pytest.raises(ValueError, match=r"mask must be a bool tensor of shape \(2, 4\)"):
        memory.remove(wrong)
    assert held(memory) == [[1, 2, 3]] * 2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["add", "remove", "clear"]), st.integers(1, 7), st.integers(0, 99)), max_size=9
    ),
    capacity=st.integers(1, 6),
    spare=st.integers(0, 4),
)
def test_22_6_it_holds_what_a_list_holds(steps: list[tuple[str, int, int]], capacity: int, spare: int) -> None:
    memory, expected, numbers = KNNMemory(2, capacity, 2, spare=spare, keep_ids=True), [[], []], [0, 0]
    for what, length, seed in steps:
        chosen = torch.rand(2, capacity, generator=seeded(seed)) < 0.5
        if what == "add":
            memory.add(pairs(*range(length), batch=2))
            for document in range(2):
                expected[document] += [(numbers[document] + j, j) for j in range(length)]
                expected[document] = expected[document][-capacity:]
                numbers[document] += length
        elif what == "remove":
            memory.remove(chosen)
            expected = [
                [e for e, gone in zip(of, chosen[b].tolist(), strict=False) if not gone]
                for b, of in enumerate(expected)
            ]
        else:
            memory.clear([seed % 2])
            expected[seed % 2], numbers[seed % 2] = [], 0
    assert ids(memory) == [[number for number, _ in of] for of in expected]
    assert held(memory) == values(memory) == [[value for _, value in of] for of in expected]


@pytest.mark.filterwarnings("ignore:a memory of .* bytes grows to")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_22_6_a_pending_backward_reads_what_its_forward_retrieved(checkpointed: bool) -> None:
    def gradients(removing: bool) -> list[Tensor]:
        torch.manual_seed(0)
        attention = KNNAttention(dim=8, heads=2, dim_head=4, num_retrieved_memories=3, attn_scale_init=5).double()
        memory = KNNMemory(4, 6, 2, spare=4, dtype=torch.float64)
        xs = [torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        losses = []
        for x in xs:
            snapshot = memory.snapshot(like=x, longest=4)
            if checkpointed:
                out, _ = checkpoint(attention, x, use_reentrant=False, knn_memory=snapshot)
            else:
                out, _ = attention(x, knn_memory=snapshot)
            losses.append(out.square().sum())
        losses[0].backward()
        losses[1].backward()
        if removing:
            memory.remove(torch.rand(2, 6) < 0.5)
            with torch.no_grad():
                attention(torch.randn(2, 4, 8, dtype=torch.float64), knn_memory=memory)
        losses[2].backward()
        return [*(x.grad for x in xs), *(parameter.grad for parameter in attention.parameters())]

    for actual, expected in zip(gradients(True), gradients(False), strict=True):
        assert_close(actual, expected, SAME_FORMULA)


def test_22_6_nothing_can_be_added_behind_a_snapshot_of_before() -> None:
    memory = filled(spare=4)
    snapshot = memory.snapshot()
    remove(memory, (0, 1))
    key = torch.ones(2, 1, 1, 2)
    with pytest.raises(StaleMemoryError, match="a snapshot must be given to one segment alone"):
        snapshot.append(key, key)
    assert held(memory) == [[1, 3], [1, 2, 3]]


# --------------------------------------------------------------------------------------------------------- over ranks


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.close()


def _spread(rank: int, capacity: int, kv_heads: int, seed: int) -> dict[str, Tensor]:
    """Does the same to a memory of two ranks and to one of this process, which must hold the same; gives its state."""
    generator = seeded(seed)
    arguments: dict[str, Any] = {"kv_heads": kv_heads, "keep_ids": True}
    sharded = KNNMemory(2, capacity, 2, process_group=dist.group.WORLD, **arguments)
    whole = KNNMemory(2, capacity, 2, **arguments)
    heads = () if kv_heads == 1 else (kv_heads,)
    for step in range(6):
        segments = torch.randn(2, 2, *heads, 3, 2, 2, generator=generator)
        given = torch.randint(0, 99, (2, 2, 3), generator=generator)
        counts = torch.randint(0, 4, (2, 2), generator=generator)
        for memory, ranks in ((sharded, [rank]), (whole, [0, 1])):
            for number in ranks:
                memory.add(segments[number], counts[number], ids=given[number] if step % 2 else None)
        if step in (2, 4):
            mask = torch.rand(2, capacity, generator=generator) < 0.3
            sharded.remove(mask & (rank == 0))
            whole.remove(mask)
        if step == 3:
            sharded.clear([1])
            whole.clear([1])
        queries = torch.randn(2, 2, 4, 2, generator=generator)
        answers = [memory.search(queries, 5, return_slots=True, return_scores=True) for memory in (sharded, whole)]
        assert torch.equal(answers[0][0], answers[1][0])
        assert torch.equal(sharded.ids_of(answers[0][2]), whole.ids_of(answers[1][2]))
        for mine, theirs in zip(sharded.entries(), whole.entries(), strict=True):
            assert torch.equal(mine, theirs)
        assert torch.equal(sharded.lengths, whole.lengths)
    again = KNNMemory(2, capacity, 2, process_group=dist.group.WORLD, **arguments)
    again.load_state_dict(whole.state_dict() if seed % 2 else sharded.state_dict())
    again.add(segments[rank])
    for number in range(2):
        whole.add(segments[number])
    for mine, theirs in zip(again.entries(), whole.entries(), strict=True):
        assert torch.equal(mine, theirs)
    return again.state_dict()


@pytest.mark.cpu
@pytest.mark.parametrize(("capacity", "kv_heads", "seed"), [(8, 1, 0), (7, 1, 1), (5, 2, 2), (20, 2, 3)])
def test_22_6_two_ranks_keep_and_remove_what_one_memory_does(
    two: Processes, capacity: int, kv_heads: int, seed: int
) -> None:
    whole = KNNMemory(2, capacity, 2, kv_heads=kv_heads, keep_ids=True)
    shards = two.run(_spread, capacity, kv_heads, seed)
    whole.load_state_dict(join_shards(shards))
    for shard in shards:
        del shard["ids"], shard["positions"]
    without = join_shards(shards)
    assert torch.equal(whole.state_dict()["keys"], without["keys"])
