"""A memory spread over ranks finds, attends and forgets as one memory does, whatever lies where."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.checks import SAME_FORMULA, SAME_SUMS, assert_close
from helpers.hard_keys import KINDS, hard_keys, queries_near
from helpers.processes import Processes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtrans import KNNAttention, KNNMemory, MemorizingTransformer, join_shards

pytestmark = pytest.mark.cpu

WIDTH = 3


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def four() -> Iterator[Processes]:
    processes = Processes(4)
    yield processes
    processes.close()


# ------------------------------------------------------------------------------- random operations, against one memory


@dataclass(frozen=True)
class Plan:
    """What is done to a memory; all ranks draw the same random numbers from the seeds."""

    batch: int
    capacity: int
    kv_heads: int
    operations: tuple[tuple[str, int, int], ...]  # what, how long or how many, a seed
    dtype: torch.dtype = torch.float32
    random_keys: bool = False  # else few different ones, so that many are equal

    def keys(self, *shape: int, generator: torch.Generator) -> Tensor:
        if self.random_keys:
            return torch.randn(*shape, WIDTH, generator=generator)
        return torch.randint(-1, 2, (*shape, WIDTH), generator=generator).float()

    @property
    def heads(self) -> tuple[int, ...]:
        return () if self.kv_heads == 1 else (self.kv_heads,)


def follow(rank: int, plan: Plan) -> None:
    """Does to a sharded memory what the plan says, and to one of this process what that means; both hold the same."""
    size = dist.get_world_size()
    arguments: dict[str, Any] = {"kv_heads": plan.kv_heads, "dtype": plan.dtype}
    sharded = KNNMemory(WIDTH, plan.capacity, plan.batch, process_group=dist.group.WORLD, **arguments)
    whole = KNNMemory(WIDTH, plan.capacity, plan.batch, **arguments)
    failures: list[str] = []
    for number, (what, length, seed) in enumerate(plan.operations):
        generator = torch.Generator().manual_seed(seed)
        scope = torch.randperm(plan.batch, generator=generator)[: 1 + seed % plan.batch].tolist()
        with sharded.at_batch_indices(scope), whole.at_batch_indices(scope):
            if what == "add":
                _add(rank, size, plan, sharded, whole, length, number, generator)
            elif what == "clear":
                masks = torch.rand(size, len(scope), generator=generator) < 0.3
                if sharded.device is not None:
                    sharded.clear_rows(masks[rank])
                    whole.clear_rows(masks.any(dim=0))
            else:
                try:
                    _search(rank, size, plan, sharded, whole, length, generator)
                except AssertionError as error:  # told at the end: the other ranks wait for this one
                    failures.append(f"operation {number}: {error}")
    assert not failures, "\n".join(failures)
    assert sharded.lengths.tolist() == whole.lengths.tolist()


def _add(
    rank: int,
    size: int,
    plan: Plan,
    sharded: KNNMemory,
    whole: KNNMemory,
    length: int,
    number: int,
    generator: torch.Generator,
) -> None:
    batch = len(sharded.scoped_indices)
    shape = (size, batch, *plan.heads, length)
    keys = plan.keys(*shape, generator=generator)
    values = (1000 * number + torch.arange(keys.numel()) % 997).reshape(keys.shape).float()
    segments = torch.stack((keys, values), dim=-2)
    counts = torch.randint(0, length + 1, (size, batch), generator=generator)
    counted = bool(torch.rand((), generator=generator) < 0.5)
    sharded.add(segments[rank], counts[rank] if counted else None)
    for segment, count in zip(segments, counts, strict=True):  # the order of writes is that of the ranks
        whole.add(segment, count if counted else None)


def _search(
    rank: int, size: int, plan: Plan, sharded: KNNMemory, whole: KNNMemory, length: int, generator: torch.Generator
) -> None:
    batch, k = len(sharded.scoped_indices), 1 + length % 7
    heads = plan.heads and (2 * plan.kv_heads,)
    queries = plan.keys(size, batch, *heads, length, generator=generator)[rank]
    found, mask = sharded.search(queries, k)
    expected, expected_mask = whole.search(queries, k)
    flat = queries.reshape(batch, *heads or (1,), length, WIDTH)
    scores, _ = sharded.snapshot().nearest(flat, k)
    expected_scores, _ = whole.snapshot().nearest(flat, k)
    assert torch.equal(mask, expected_mask)
    if plan.random_keys:
        assert_close(found, expected, 0.0)
    else:
        assert torch.equal(found, expected)
    assert torch.equal(scores.isinf(), expected_scores.isinf())
    assert_close(scores.nan_to_num(neginf=0.0), expected_scores.nan_to_num(neginf=0.0), SAME_SUMS)


operations = st.tuples(
    st.sampled_from(["add", "add", "search", "search", "clear"]), st.integers(1, 9), st.integers(0, 999)
)
plans = st.builds(
    Plan,
    batch=st.integers(1, 3),
    capacity=st.integers(1, 13),
    kv_heads=st.sampled_from([1, 1, 2]),
    operations=st.lists(operations, min_size=4, max_size=14).map(tuple),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.float64]),
    random_keys=st.booleans(),
)
whatever = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(whatever, max_examples=25)
@given(plan=plans)
def test_two_ranks_find_what_one_memory_finds(two: Processes, plan: Plan) -> None:
    two.run(follow, plan)


@pytest.mark.slow
@settings(whatever, max_examples=300)
@given(plan=plans)
def test_four_ranks_find_what_one_memory_finds(four: Processes, plan: Plan) -> None:
    four.run(follow, plan)


def empty_and_full(rank: int) -> tuple[list[bool], list[float], list[int]]:
    """A search of nothing, then more entries than there is room for, of which some ranks hold one more than others."""
    memory = KNNMemory(1, max_memories=5, process_group=dist.group.WORLD, device="cpu")
    _, mask = memory.search(torch.ones(1, 2, 1), 3)
    numbers = torch.arange(8.0) + 8 * rank
    memory.add(torch.stack((torch.ones(8), numbers), dim=-1)[None, ..., None])
    found, _ = memory.search(torch.ones(1, 1, 1), 9)
    return mask.flatten().tolist(), found[0, 0, :, 1, 0].tolist(), memory.lengths.tolist()


def test_equal_keys_come_older_first_across_ranks_and_only_the_newest_m_are_there(two: Processes) -> None:
    expected = ([False] * 6, [11.0, 12.0, 13.0, 14.0, 15.0, 0.0, 0.0, 0.0, 0.0], [5])
    assert two.run(empty_and_full) == [expected, expected]


def beside_one_memory(rank: int, kind: str, width: int, dtype: torch.dtype, k: int) -> None:
    """Scores and entries, bit for bit, over a memory that wraps, of keys that stand at other places on two ranks."""
    arguments: dict[str, Any] = {"device": "cpu", "dtype": dtype, "spare": 64, "backend": "native"}
    sharded = KNNMemory(width, 500, process_group=dist.group.WORLD, **arguments)
    whole = KNNMemory(width, 500, **arguments)
    keys = hard_keys(kind, 2 * 7 * 61, width, torch.float32)
    for pair in keys.reshape(7, 2, 1, 61, width):  # of both ranks, in their order
        sharded.add((pairs := torch.stack((pair, pair), dim=-2))[rank])
        for segment in pairs:
            whole.add(segment)
    query = queries_near(keys, 2 * 23).reshape(2, 1, 1, 23, width)[rank]
    scores, entries = sharded.snapshot().nearest(query, k)
    expected_scores, slots = whole.snapshot().nearest(query, k)
    assert torch.equal(entries, whole.snapshot().entries_in(slots))
    assert torch.equal(scores, expected_scores)
    again = sharded.snapshot().nearest(query, k)
    assert torch.equal(scores, again[0]) and torch.equal(entries, again[1])


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_find_bit_for_bit_what_one_memory_finds(two: Processes, kind: str) -> None:
    for width, dtype, k in ((64, torch.float32, 32), (24, torch.float16, 3), (96, torch.bfloat16, 70)):
        two.run(beside_one_memory, kind, width, dtype, k)


# ----------------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class Layer:
    neighbours: int = 4
    kv_heads: int = 1
    memory_offset: float | None = -1.0
    combine: str = "softmax"
    xl: int = 0
    memory_query: str = "shared"


LAYERS = {
    "partial results travel": Layer(neighbours=8),
    "the winners travel": Layer(neighbours=1),
    "grouped heads and a cache": Layer(kv_heads=2, xl=5),
    "a gate": Layer(combine="gate", memory_offset=None),
    "a query of its own": Layer(neighbours=2, memory_query="own"),
}


def attention_of(layer: Layer) -> KNNAttention:
    torch.manual_seed(5)
    attention = KNNAttention(
        dim=16,
        heads=4,
        dim_head=8,
        num_retrieved_memories=layer.neighbours,
        kv_heads=layer.kv_heads,
        memory_offset=layer.memory_offset,
        combine=layer.combine,
        xl_max_memories=layer.xl,
        memory_query=layer.memory_query,
    ).double()
    if attention.memory_mix is not None:
        torch.nn.init.normal_(attention.memory_mix, std=0.4)
    return attention


def attended(attention: KNNAttention, x: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    """Result, and gradients of the input and of every parameter; then those are cleared."""
    x = x.clone().requires_grad_()
    out, _, *after = attention(x, **arguments)
    (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
    grads = [parameter.grad.clone() for parameter in attention.parameters() if parameter.grad is not None]
    attention.zero_grad()
    return (out.detach(), x.grad, *grads, *after)


def attend(rank: int, layer: Layer) -> None:
    """Segment after segment; a second attention does for every rank what it does here, with one whole memory."""
    size, batch, length = dist.get_world_size(), 2, 6
    attention = attention_of(layer)
    arguments: dict[str, Any] = {"max_memories": 20, "num_indices": batch, "kv_heads": layer.kv_heads}
    arguments["dtype"] = torch.float64  # the same formula in two ways
    sharded, whole = KNNMemory(8, process_group=dist.group.WORLD, **arguments), KNNMemory(8, spare=32, **arguments)
    for segment in range(5):
        draw = {"generator": torch.Generator().manual_seed(segment), "dtype": torch.float64}
        inputs = torch.randn(size, batch, length, 16, **draw)
        caches = torch.randn(size, batch, *((2,) if layer.kv_heads > 1 else ()), layer.xl, 2, 8, **draw)
        cache = [{"xl_memory": cache} if layer.xl else {} for cache in caches]
        got = attended(attention, inputs[rank], knn_memory=sharded, **cache[rank])
        snapshot = after = whole.snapshot(like=inputs, longest=length)
        for other in range(size):
            *expected, after = attended(
                attention, inputs[other], knn_memory=snapshot, add_to=after, return_memory=True, **cache[other]
            )
            if other == rank:
                for place, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
                    assert_close(mine, theirs, SAME_FORMULA, f"segment {segment}, number {place}")
    assert sharded.lengths.tolist() == whole.lengths.tolist() == [20, 20]


@pytest.mark.parametrize("layer", LAYERS)
def test_attention_and_its_gradients_are_those_of_one_memory(two: Processes, layer: str) -> None:
    two.run(attend, LAYERS[layer])


FIRST, *REST = LAYERS


@pytest.mark.parametrize("layer", [FIRST, *(pytest.param(layer, marks=pytest.mark.slow) for layer in REST)])
def test_so_they_are_with_four_ranks(four: Processes, layer: str) -> None:
    four.run(attend, LAYERS[layer])


EXCHANGES = ("all_to_all_single", "all_gather_into_tensor")


def bytes_of_a_query(rank: int, k: int, learning: bool) -> tuple[float, bool]:
    """What this rank receives for each query in a search and an attention, with its gradient; whether all is right."""
    size, width, queries, received = dist.get_world_size(), 8, 64, 0
    group, exchanges = dist.group.WORLD, {name: getattr(dist, name) for name in EXCHANGES}

    def counted(name: str) -> Callable[..., Any]:
        def counting(got: Tensor, *arguments: Any, **options: Any) -> Any:
            nonlocal received
            received += got.nbytes
            return exchanges[name](got, *arguments, **options)

        return counting

    whole = KNNMemory(width, 64, device="cpu", value_dtype=torch.float16)
    sharded = KNNMemory(width, 64, device="cpu", value_dtype=torch.float16, process_group=group)
    pairs = torch.randn(size, 1, 32, 2, width, generator=torch.Generator().manual_seed(0))
    sharded.add(pairs[rank])
    for segment in pairs:
        whole.add(segment)
    query = torch.randn(1, 1, queries, width, generator=torch.Generator().manual_seed(rank + 1))
    found = sharded.snapshot().nearest(query, k)[0]
    keys, values = whole.snapshot().pairs(query, k)[0].unbind(dim=-2)
    scale = torch.tensor([0.5])
    expected = ((found * 0.5).softmax(dim=-1)[..., None] * values).sum(dim=-2)
    gradient = 0.5 * ((found * 0.5).softmax(dim=-1)[..., None] * (values - expected[..., None, :])).sum(dim=-1)
    query.requires_grad_(learning)
    for name in EXCHANGES:
        setattr(dist, name, counted(name))
    try:
        with torch.set_grad_enabled(learning):
            out, *_ = sharded.snapshot().attend_to_retrieved(query, k, scale)
            if learning:
                out.sum().backward()
    finally:
        for name in EXCHANGES:
            setattr(dist, name, exchanges[name])
    right = torch.allclose(out, expected, atol=SAME_SUMS)
    if learning:
        right = right and torch.allclose(query.grad, (gradient[..., None] * keys).sum(dim=-2), atol=10 * SAME_SUMS)
    return received / queries, right


@pytest.mark.parametrize(
    ("k", "learning", "travels"),
    [
        (4, False, 4 * 16),  # the winners' values of 8 numbers in float16, not 2 · 36 of the two partial results
        (5, False, 2 * 36),
        (4, True, 4 * (32 + 16)),  # the winners' keys and values, not 2 · (36 + 36 + 32)
        (5, True, 2 * (36 + 36 + 32)),
    ],
)
def test_the_smaller_of_winners_and_partial_results_travels(
    two: Processes, k: int, learning: bool, travels: int
) -> None:
    """Counted with what a rank sends to itself, which an exchange holds too; as the module's docstring says."""
    search = 2 * (32 + 8 * k + k)
    by_rank = two.run(bytes_of_a_query, k, learning)
    assert all(right for _, right in by_rank)
    mean = sum(received for received, _ in by_rank) / 2
    assert mean == pytest.approx(search + travels, abs=0.3)  # the scale, which each rank tells the others once


def read_side_by_side(rank: int, activation_checkpointing: bool) -> list[float]:
    """A model on each rank reads its segments of the same two documents; several segments before one backward."""
    torch.manual_seed(0)
    model = MemorizingTransformer(
        num_tokens=11, dim=16, depth=2, heads=2, dim_head=8, memorizing_layers=(1, 2), max_knn_memories=24,
        num_retrieved_memories=4, activation_checkpointing=activation_checkpointing, pad_id=-1,
        clear_memories_on_sos_token_id=10,
    )  # fmt: skip
    memories = model.create_knn_memories(batch_size=2, process_group=dist.group.WORLD, spare=20)
    tokens = torch.randint(0, 10, (4, dist.get_world_size(), 2, 6), generator=torch.Generator().manual_seed(1))
    tokens[2, 1, 0, 3] = 10  # the second rank alone sees that document 0 begins anew
    losses = [model(segment[rank, :, :-1], memories, labels=segment[rank, :, 1:]) for segment in tokens]
    sum(losses).backward()
    gradient = sum(
        float(parameter.grad.square().sum()) for parameter in model.parameters() if parameter.grad is not None
    )
    lengths = [length for memory in memories for length in memory.lengths.tolist()]
    return [*(float(loss) for loss in losses), gradient, *lengths]


def test_a_model_reads_with_a_sharded_memory_recomputed_or_not(two: Processes) -> None:
    plain, recomputed = (two.run(read_side_by_side, flag) for flag in (False, True))
    for rank, (expected, got) in enumerate(zip(plain, recomputed, strict=True)):
        assert got == pytest.approx(expected, rel=SAME_SUMS), rank
        assert expected[-4:] == [12, 24, 12, 24], "what comes from the token on: two of its rank, ten of the next step"


@torch.no_grad()
def read_on_behind_a_clearing(rank: int) -> dict[str, Any]:
    """The second rank alone forgets document 0, between two segments."""
    torch.manual_seed(0)
    model = MemorizingTransformer(
        num_tokens=11, dim=16, depth=2, heads=2, dim_head=8, memorizing_layers=(1, 2), max_knn_memories=40,
        num_retrieved_memories=4, xl_max_memories=4,
    ).eval()  # fmt: skip
    tokens = torch.randint(0, 10, (3, dist.get_world_size(), 2, 6), generator=torch.Generator().manual_seed(1))[:, rank]
    memories, fresh = (model.create_knn_memories(batch_size=2, process_group=dist.group.WORLD) for _ in range(2))
    caches = None
    for segment in tokens[:2]:
        _, caches = model(segment, memories, caches)
    memories.clear_rows(torch.tensor([rank == 1, False]))
    found, _ = model(tokens[2], memories, caches)
    alone, _ = model(tokens[2], fresh)
    state = memories[0].state_dict()
    return {"found": found, "alone": alone, "lengths": memories[0].lengths.tolist(), "state": state}


def test_21_5_what_one_rank_forgets_is_out_of_sight_in_the_caches_of_all(two: Processes) -> None:
    ranks = two.run(read_on_behind_a_clearing)
    for rank in ranks:
        assert_close(rank["found"][0], rank["alone"][0], SAME_SUMS)
        assert not torch.allclose(rank["found"][1], rank["alone"][1])
        assert rank["lengths"] == [2 * (6 - 4), 2 * (18 - 4)], "of each rank what its segments hold beyond its cache"
    assert join_shards([rank["state"] for rank in ranks])["clearings"].tolist() == [1, 0]


# --------------------------------------------------------------------------------------------------- states, bad input


def filled(capacity: int = 7, **arguments: Any) -> KNNMemory:
    """Of two ranks' or one process's: 5 segments, each rank's of 2 entries; document 1 was cleared on the way."""
    memory = KNNMemory(2, capacity, 2, **arguments)
    group = arguments.get("process_group")
    for segment in range(5):
        numbers = torch.arange(4.0).expand(2, 4) + 4 * segment + torch.tensor([[0.0], [100.0]])
        pairs = torch.stack((numbers.sin(), numbers), dim=-1)[..., None].expand(2, 4, 2, 2)
        memory.add(pairs if group is None else pairs[:, 2 * dist.get_rank() :][:, :2])
        if segment == 3:
            memory.clear_rows(torch.tensor([False, True]))
    return memory


def states(rank: int) -> dict[str, Any]:
    """This rank's share, and the shares of memories that took it up, or a whole one, in this and other sizes."""
    group = dist.group.WORLD
    share = filled(process_group=group).state_dict()
    kept: dict[str, Any] = {"share": share}
    for name, state, capacity in (("same", share, 7), ("larger", share, 9), ("whole", filled().state_dict(), 7)):
        memory = KNNMemory(2, capacity, 2, process_group=group)
        memory.load_state_dict(state)
        kept[name] = memory.state_dict()
        memory.add(torch.full((2, 1, 2, 2), 3.0 + rank))
        kept[f"{name}, and more"] = memory.state_dict()
    return kept


def assert_same_state(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state["lengths"].tolist() == expected["lengths"].tolist()
    for row, length in enumerate(expected["lengths"].tolist()):
        for name in ("keys", "values"):
            width = state[name].shape[1], expected[name].shape[1]
            assert torch.equal(state[name][row, width[0] - length :], expected[name][row, width[1] - length :])


def test_shards_make_a_whole_and_a_whole_makes_shards(two: Processes) -> None:
    found = two.run(states)
    whole = filled()
    for name in ("share", "same", "larger", "whole"):
        assert_same_state(join_shards([state[name] for state in found[::-1]]), whole.state_dict())
    joined = KNNMemory(2, 7, 2)
    joined.load_state_dict(join_shards([state["share"] for state in found]))
    assert_same_state(joined.state_dict(), whole.state_dict())
    whole.add(torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1).expand(2, 2, 2, 2))
    for name in ("same", "whole"):
        assert_same_state(join_shards([state[f"{name}, and more"] for state in found]), whole.state_dict())


def messages(rank: int) -> list[str]:
    """What each misuse raises."""
    group = dist.group.WORLD
    memory = filled(process_group=group)
    state = memory.state_dict()
    other = {**state, "shard": torch.tensor([0, 4])}
    calls: list[Callable[[], Any]] = [
        lambda: KNNMemory(2, 7 + rank, process_group=group, device="cpu"),
        lambda: KNNMemory(2, process_group="world"),
        lambda: memory.load_state_dict(other),
        lambda: KNNMemory(2, 7, 2).load_state_dict(state),
        lambda: join_shards([state]),
        lambda: join_shards([state, other]),
        lambda: copy.deepcopy(memory),
        lambda: memory.add(torch.full((2, 1, 2, 2), torch.nan)),
        lambda: KNNAttention(dim=4, heads=1, dim_head=2, attend_to="all")(torch.ones(2, 3, 4), knn_memory=memory),
    ]
    raised = []
    for call in calls:
        try:
            call()
        except (ValueError, TypeError) as error:
            raised.append(str(error))
    return raised


def test_what_cannot_be_is_refused_by_name(two: Processes) -> None:
    expected = [
        "max_memories must be the same on every rank, got 7 on rank 0 and 8 on rank 1",
        "process_group must be a torch.distributed.ProcessGroup, got str",
        "state must be a whole memory's or shard {rank} of 2, got shard 0 of 4; join_shards makes all shards a whole",
        "state must be a whole memory's, got shard {rank} of 2; join_shards makes all shards a whole",
        "states must be those of all shards of one memory, got shards [({rank}, 2)]",
        "states must be those of all shards of one memory, got shards [({rank}, 2), (0, 4)]",
        "a sharded memory must be copied by its state_dict, got a copy that has no process group",
        "the values in memories must be numbers, got NaN components",
        "attend_to must be 'neighbours' with a memory spread over 2 ranks, got 'all'",
    ]
    for rank, got in enumerate(two.run(messages)):
        assert got == [message.replace("{rank}", str(rank)) for message in expected]
