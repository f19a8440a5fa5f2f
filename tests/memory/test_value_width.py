"""Values of another width than keys: what a memory of pairs does, with keys and values by themselves."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.checks import SAME_FORMULA, assert_close
from helpers.processes import Processes
from torch import Tensor

from memtrans import KNNMemory, KNNMemoryList, join_shards
from memtrans.local_keys import LocalKeys
from memtrans.memory.sharded import ShardedSnapshot

pytestmark = pytest.mark.cpu

D, E = 3, 5
GROUPS = [1, 2]


def drawn(seed: int, *shape: int, widths: tuple[int, int] = (D, E)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(*shape, width, generator=generator, dtype=torch.float64) for width in widths)
    return keys, values


def memory_of(groups: int, capacity: int = 7, **arguments: Any) -> KNNMemory:
    sizes = {"dim": D, "value_dim": E, "max_memories": capacity, "num_indices": 2, "kv_heads": groups}
    return KNNMemory(**{**sizes, "dtype": torch.float64, **arguments})


def heads_of(groups: int) -> tuple[int, ...]:
    return () if groups == 1 else (groups,)


def filled(groups: int, steps: int = 3, **arguments: Any) -> KNNMemory:
    memory = memory_of(groups, **arguments)
    for step in range(steps):
        memory.add(drawn(step, 2, *heads_of(groups), 4))
    return memory


@pytest.mark.parametrize("groups", GROUPS)
def test_what_is_found_is_what_a_list_of_the_newest_entries_holds(groups: int) -> None:
    memory, heads = filled(groups), heads_of(groups)
    keys, values = (torch.cat(parts, dim=-2)[..., -7:, :] for parts in zip(*(drawn(s, 2, *heads, 4) for s in range(3)),
                                                                          strict=True))  # fmt: skip
    queries, _ = drawn(9, 2, *heads, 6)
    (found_keys, found_values), mask, scores = memory.search(queries, 4, return_scores=True)
    expected, place = (queries @ keys.transpose(-1, -2)).topk(4, dim=-1)
    assert_close(scores, expected, SAME_FORMULA)
    for found, held in ((found_keys, keys), (found_values, values)):
        index = place[..., None].expand(*place.shape, held.shape[-1])
        assert torch.equal(found, held.unsqueeze(-3).expand(*place.shape[:-1], *held.shape[-2:]).gather(-2, index))
    assert mask.all() and memory.shape == (2, *heads, 7, D + E)


def test_where_less_is_held_than_asked_for_zeros_come_with_a_false_mask() -> None:
    memory = filled(1, steps=0)
    keys, values = drawn(0, 2, 1)
    memory.add((keys, values))
    (found_keys, found_values), mask = memory.search(torch.ones(2, D).half(), topk=3)
    assert mask.tolist() == [[True, False, False]] * 2
    assert (found_keys.dtype, found_values.dtype) == (torch.float16, torch.float16)
    assert torch.equal(found_values[:, 0], values[:, 0].half()) and torch.equal(found_keys[:, 0], keys[:, 0].half())
    assert not found_keys[:, 1:].any() and not found_values[:, 1:].any()


@pytest.mark.parametrize("groups", GROUPS)
def test_keys_and_values_of_one_width_may_be_given_by_themselves_too(groups: int) -> None:
    memories = [KNNMemory(D, 7, 2, kv_heads=groups, dtype=torch.float64) for _ in range(2)]
    keys, values = drawn(0, 2, *heads_of(groups), 4, widths=(D, D))
    memories[0].add((keys, values))
    memories[1].add(torch.stack((keys, values), dim=-2))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*(m.state_dict().values() for m in memories),
                                                                strict=True))  # fmt: skip


@pytest.mark.parametrize("groups", GROUPS)
def test_scopes_views_ids_counts_and_removal(groups: int) -> None:
    memory, heads = memory_of(groups, keep_ids=True), heads_of(groups)
    keys, values = drawn(0, 2, *heads, 4)
    memory.add((keys, values), torch.tensor([4, 2]), ids=torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]]))
    with memory.at_batch_indices([1]):
        memory.add((keys[:1], values[:1]), ids=torch.tensor([[30, 31, 32, 33]]))
    entries = memory.entries()
    assert entries.values.shape == (2, *heads, 7, E) and entries.keys.shape == (2, *heads, 7, D)
    assert entries.ids.tolist() == [[10, 11, 12, 13, -1, -1, -1], [20, 21, 30, 31, 32, 33, -1]]
    assert torch.equal(entries.values[1, ..., 2:6, :], values[0])
    view = memory.expand([1, 1, 0])
    assert view.shape == (3, *heads, 7, D + E)
    (_, found), _, slots = view.search(keys[[1, 1, 0]], 1, return_slots=True)
    assert torch.equal(found, memory.search(keys, 1)[0][1][[1, 1, 0]])
    assert set(view.ids_of(slots)[0].flatten().tolist()) <= {20, 21, 30, 31, 32, 33}
    memory.remove(entries.ids == 31)
    assert memory.entries().ids[1].tolist() == [20, 21, 30, 32, 33, -1, -1]
    assert torch.equal(memory.entries().values[1, ..., 3:5, :], values[0][..., 2:4, :])
    memory.clear([1])
    assert memory.lengths.tolist() == [4, 0]


def same(mine: KNNMemory, theirs: KNNMemory) -> bool:
    return all(torch.equal(x, y) for x, y in zip(mine.entries()[:3], theirs.entries()[:3], strict=True))


@pytest.mark.parametrize("groups", GROUPS)
def test_states_files_copies_pickles_and_casts(groups: int, tmp_path: Any) -> None:
    memory = filled(groups)
    state = memory.state_dict()
    assert state["keys"].shape == (2 * groups, 7, D) and state["values"].shape == (2 * groups, 7, E)
    smaller = memory_of(groups, capacity=3)
    smaller.load_state_dict(state)
    assert torch.equal(smaller.entries().values, memory.entries().values[..., -3:, :])
    memory.save(tmp_path / "memory")
    KNNMemoryList([memory, memory]).save(tmp_path / "list")
    for again in (KNNMemory.load(tmp_path / "memory"), KNNMemoryList.load(tmp_path / "list")[1], copy.deepcopy(memory),
                  pickle.loads(pickle.dumps(memory))):  # fmt: skip
        assert (again.dim, again.value_dim, again.shape) == (D, E, memory.shape) and same(again, memory)
    assert memory.half().entries().values.dtype == torch.float16 and memory.value_dim == E


def test_an_empty_memory_has_entries_and_a_state_of_both_widths(tmp_path: Any) -> None:
    memory = memory_of(2)
    entries, state = memory.entries(), memory.state_dict()
    assert entries.keys.shape == (2, 2, 7, D) and entries.values.shape == (2, 2, 7, E) and not entries.mask.any()
    assert state["keys"].shape == (4, 0, D) and state["values"].shape == (4, 0, E)
    memory.save(tmp_path / "memory")
    assert KNNMemory.load(tmp_path / "memory").value_dim == E


def test_the_configuration_says_a_width_of_values_only_where_it_is_another() -> None:
    """So files that were written before there was one load, and files without one are what they were."""
    assert "value_dim" not in KNNMemory(D, 7, 2, value_dim=D).configuration()
    assert memory_of(1).configuration()["value_dim"] == E


def test_a_ring_that_grows_under_a_pending_backward_pass_keeps_values() -> None:
    memory = filled(1, steps=1, spare=2)
    query = torch.randn(2, 1, 3, D, requires_grad=True, dtype=torch.float64)
    snapshot = memory.snapshot()
    out, *_ = snapshot.attend_to_retrieved(query, 2, torch.ones(1).double())
    memory.add(drawn(5, 2, 30))  # a segment longer than all the memory
    out.sum().backward()
    assert out.shape == (2, 1, 3, E) and query.grad.isfinite().all()
    assert torch.equal(memory.entries().values, drawn(5, 2, 30)[1][:, -7:])


# --------------------------------------------------------------------------------------------------------- attention


def local_keys(groups: int, length: int, value_width: int) -> LocalKeys:
    key, value = drawn(7, 2, groups, length, widths=(D, value_width))
    return LocalKeys(key, value, None, None, None)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("groups", GROUPS)
def test_attention_is_that_to_values_and_keys_filled_up_with_zeros(groups: int, gate: bool) -> None:
    """Zeros behind a key add nothing to a product, zeros behind a value nothing to the rest of it."""
    wide = KNNMemory(E, 7, 2, kv_heads=groups, dtype=torch.float64)
    for step in range(3):
        keys, values = drawn(step, 2, *heads_of(groups), 4)
        wide.add((torch.nn.functional.pad(keys, (0, E - D)), values))
    query, local = drawn(8, 2, 2 * groups, 6)[0], local_keys(groups, 6, E)
    arguments: dict[str, Any] = {"scale": torch.full((2 * groups,), 0.7).double()}
    arguments["memory_gate"] = torch.tensor([0.3, -1.0] * groups).double() if gate else None
    out = filled(groups).snapshot().attend(query, 3, local, **arguments)
    padded = local._replace(key=torch.nn.functional.pad(local.key, (0, E - D)))
    expected = wide.snapshot().attend(torch.nn.functional.pad(query, (0, E - D)), 3, padded, **arguments)
    assert out.shape == (2, 2 * groups, 6, E)
    assert_close(out, expected, SAME_FORMULA)


# ------------------------------------------------------------------------------------------------------------ misuse


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda m: m.add(torch.ones(2, 1, 2, D)), ValueError,
         r"memories must be keys and values, two tensors whose last axes are 3 and 5, .* got pairs in one tensor"),
        (lambda m: m.add(drawn(0, 2, 4)[:1]), ValueError, "memories must be pairs in one tensor, or keys and values, "
         "got 1 tensors"),
        (lambda m: m.add(drawn(0, 3, 4)), ValueError, r"keys must have shape \(2, N, 3\) for 2 .*\(3, 4, 3\)"),
        (lambda m: m.add(drawn(0, 2, 4, widths=(D, D))), ValueError,
         r"values must have shape \(2, 4, 5\) for 2 documents in scope, got \(2, 4, 3\)"),
        (lambda m: m.add((drawn(0, 2, 4)[0], drawn(0, 2, 3)[1])), ValueError,
         r"values must have shape \(2, 4, 5\) .*got \(2, 3, 5\)"),
        (lambda m: m.add((torch.ones(2, 4, D), torch.ones(2, 4, E).long())), TypeError,
         "values must be floating point, got torch.int64"),
        (lambda m: m.add((torch.ones(2, 4, D), None)), TypeError, "values must be a torch.Tensor, got NoneType"),
        (lambda m: m.add((torch.ones(2, 4, D), torch.full((2, 4, E), torch.nan))), ValueError,
         "the values in memories must be numbers, got NaN components"),
        (lambda m: m.load_state_dict(KNNMemory(D, 7, 2).state_dict()), ValueError,
         r"state must hold keys of shape \(2, entries, 3\) and values of shape \(2, entries, 5\)"),
        (lambda m: memory_of(1, value_dim=0), ValueError, "value_dim must be at least 1, got 0"),
        (lambda m: memory_of(1, value_dim=2.0), TypeError, "value_dim must be an integer, got 2.0"),
        (lambda m: m.snapshot(like=torch.ones(1)).check_fits("knn_memory", 2, 1, D, D), ValueError,
         "kv_heads=1 and dim=3, got 2 documents, kv_heads=1 and dim=3, value_dim=5"),
    ],
)  # fmt: skip
def test_errors_name_argument_value_and_expectation(act: Any, error: type, message: str) -> None:
    memory = memory_of(1)
    with pytest.raises(error, match=message):
        act(memory)
    assert memory.lengths.tolist() == [0, 0]


# --------------------------------------------------------------------------------------------------- several ranks


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.close()


def as_one_memory(rank: int, groups: int, k: int) -> dict[str, Tensor]:
    """A sharded memory does what one of this process does; returns the state of its shard."""
    arguments: dict[str, Any] = {"keep_ids": True, "capacity": 9}
    sharded = memory_of(groups, process_group=dist.group.WORLD, **arguments)
    whole, heads = memory_of(groups, **arguments), heads_of(groups)
    for step in range(3):
        counts = torch.tensor([[4, 2], [1, 3]])
        for number in range(2):
            given = drawn(2 * step + number, 2, *heads, 4)
            whole.add(given, counts[number])
            if number == rank:
                sharded.add(given, counts[number])
    query, local = drawn(20 + rank, 2, 2 * groups, 3)[0], local_keys(groups, 3, E)
    given = query if groups > 1 else query[:, 0]
    mine, theirs = (memory.search(given, k) for memory in (sharded, whole))
    assert all(torch.equal(x, y) for x, y in zip((*mine[0], mine[1]), (*theirs[0], theirs[1]), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(sharded.entries(), whole.entries(), strict=True))
    results = []
    for memory in (sharded, whole):
        asking = query.clone().requires_grad_()
        out = memory.snapshot().attend(asking, k, local, torch.full((2 * groups,), 0.7).double())
        out.square().sum().backward()
        with torch.no_grad():
            assert_close(
                memory.snapshot().attend(query, k, local, torch.full((2 * groups,), 0.7).double()), out, SAME_FORMULA
            )
        results.append((out, asking.grad))
    for x, y in zip(*results, strict=True):
        assert_close(x, y, SAME_FORMULA)
    assert isinstance(sharded.snapshot(), ShardedSnapshot)
    return sharded.state_dict()


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("k", [2, 60], ids=["winners travel", "parts travel"])
def test_a_memory_of_two_ranks_is_one_memory(two: Processes, groups: int, k: int) -> None:
    states = two.run(as_one_memory, groups, k)
    joined = memory_of(groups, capacity=9, keep_ids=True)
    joined.load_state_dict(join_shards(states))
    assert joined.entries().values.shape[-1] == E and int(joined.lengths.min()) > 0
