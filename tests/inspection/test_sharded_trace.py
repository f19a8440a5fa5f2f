"""What a trace says of a memory that is spread over ranks, against one softmax over all that every rank stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.checks import SAME_FORMULA, assert_close
from helpers.definition import Document, begun, dense
from helpers.processes import Processes
from torch import Tensor

from memtrans import KNNAttention, KNNMemory, KNNMemoryList, MemorizingTransformer
from memtrans_kernels import cosine

pytestmark = pytest.mark.cpu
B, H, N, D, M, DIM = 2, 4, 5, 8, 23, 12


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


FORMS: dict[str, dict[str, Any]] = {
    "partial results travel": {"num_retrieved_memories": 8},
    "the winners travel": {"num_retrieved_memories": 1, "memory_offset": -0.5},
    "a gate, and a cache": {"combine": "gate", "xl_max_memories": 7, "num_retrieved_memories": 3},
    "heads of their own": {"kv_heads": H, "soft_cap": 3.0, "num_retrieved_memories": 3},
    "groups, a cache and a sink": {"kv_heads": 2, "xl_max_memories": 7, "sink": True, "num_retrieved_memories": 3},
    "not causal": {"causal": False, "num_retrieved_memories": 3},
    "a query of its own": {"memory_query": "own", "num_retrieved_memories": 3},
}


def memories_of(layer: KNNAttention, **options: Any) -> KNNMemoryList:
    arguments = {"kv_heads": layer.kv_heads, "dtype": torch.float64, "process_group": dist.group.WORLD, "spare": 64}
    return KNNMemoryList([KNNMemory(D, M, B, device="cpu", **{**arguments, **options})])


@torch.no_grad()
def follow_the_definition(rank: int, form: str, keep_ids: bool) -> None:
    """Through segments that fill the ring, go round it, clear a row on the last rank, and are saved and read again."""
    size = dist.get_world_size()
    torch.manual_seed(3)
    layer = begun(KNNAttention(dim=DIM, heads=H, dim_head=D, **FORMS[form]).double())
    table, memories = torch.randn(H, 6, dtype=torch.float64), memories_of(layer, keep_ids=keep_ids)
    rows: list[list[Document]] = [of_all_ranks(layer, size) for _ in range(B)]
    xl_memory, before = None, [0] * B  # stored when the memory was saved: there positions begin anew without ids
    for segment in range(7):
        if segment == 4:
            memories.clear_rows(torch.tensor([rank == size - 1, False]))
            rows[0] = of_all_ranks(layer, size)
        if segment == 5:
            state, memories = memories.state_dict(), memories_of(layer, keep_ids=keep_ids)
            memories.load_state_dict(state)
            before = [0 if keep_ids else max(0, len(row[0].stored) - M) for row in rows]
        x = torch.randn(size, B, N, DIM, dtype=torch.float64)  # of all ranks, alike on each
        held = torch.tensor([len(row[rank].cached) for row in rows]) + N
        with memories.tracing(local=True) as trace:
            _, xl_memory = layer(
                x[rank], knn_memory=memories[0], xl_memory=xl_memory, rel_pos_bias=table, local_length=held
            )
        asked, keys = projected(layer, x[rank])[0], [projected(layer, of_rank)[1] for of_rank in x]
        for row, documents in enumerate(rows):
            to_memory, to_local = documents[rank].weights(asked[row], keys[rank][row], table)
            positions = trace.positions(row, 0)
            positions = positions.where(positions < 0, positions + before[row])
            found = dense(positions, trace.weights(row, 0), to_memory.shape[2])
            assert_close(found, to_memory, SAME_FORMULA, f"weights in segment {segment}")
            local = trace.local_weights(row, 0)[0]
            assert_close(local[..., -int(held[row]) :], to_local, SAME_FORMULA, "local weights")
            for document, key in zip(documents, keys, strict=True):  # stored in the order of the ranks
                document.go_on(key[row], layer.xl_max_memories)
    assert len(rows[1][0].stored) > M + size * N


def of_all_ranks(layer: KNNAttention, size: int) -> list[Document]:
    """One document as each rank has it: what is stored is the same for all, an XL cache each has for itself."""
    stored: list[Tensor] = []
    return [Document(layer, M, stored) for _ in range(size)]


def projected(layer: KNNAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    query, key, _ = layer.project(x)
    return cosine(query, key)


@pytest.mark.parametrize("keep_ids", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_weights_are_those_of_the_definition(two: Processes, form: str, keep_ids: bool) -> None:
    two.run(follow_the_definition, form, keep_ids)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_so_they_are_with_four_ranks(four: Processes, form: str) -> None:
    four.run(follow_the_definition, form, True)


@torch.no_grad()
def positions_by_rank(rank: int) -> tuple[list[int], list[int]]:
    """Of a sharded memory and of a whole one that was given the same ids, and had the same entries removed."""
    layer = KNNAttention(dim=DIM, heads=H, dim_head=D, num_retrieved_memories=6).double()
    sharded, whole = memories_of(layer, keep_ids=True), memories_of(layer, keep_ids=True, process_group=None)
    generator = torch.Generator().manual_seed(4)
    for segment in range(3):
        pairs = torch.randn(dist.get_world_size(), B, N, 2, D, generator=generator, dtype=torch.float64)
        ids = torch.randint(1000, pairs.shape[:3], generator=generator) if segment != 1 else None
        sharded[0].add(pairs[rank], ids=None if ids is None else ids[rank])
        for other, of_rank in enumerate(pairs):
            whole[0].add(of_rank, ids=None if ids is None else ids[other])
    gone = torch.rand(B, M, generator=generator) < 0.4
    sharded[0].remove(gone)
    whole[0].remove(gone)
    torch.manual_seed(5)
    x, found = torch.randn(B, N, DIM, dtype=torch.float64), []
    for memories in (sharded, whole):
        with memories.tracing() as trace:
            layer(x, knn_memory=memories[0], add_knn_memory=False)
        found.append(trace.positions(1, 0).flatten().tolist())
    return found[0], found[1]


def test_positions_are_the_ids_that_were_given_and_stay_with_entries_when_others_are_removed(two: Processes) -> None:
    for of_shards, of_whole in two.run(positions_by_rank):
        assert of_shards == of_whole


@torch.no_grad()
def citations_by_rank(rank: int) -> list[int]:
    """A model reads one document, a part on each rank, and then what the other one read first; alike is found."""
    torch.manual_seed(0)
    model = MemorizingTransformer(
        num_tokens=50, dim=32, depth=1, dim_head=8, heads=4, memorizing_layers=1, num_retrieved_memories=4, pad_id=-1
    ).eval()
    layer = model.layers[0][0].fn
    layer.to_q.weight.copy_(layer.to_kv.weight[:8].repeat(4, 1))
    memories = model.create_knn_memories(batch_size=1, process_group=dist.group.WORLD, max_memories=200, keep_ids=True)
    text = torch.arange(48).view(2, dist.get_world_size(), 12)
    for segment in text:
        model(segment[rank][None], memories)
    with memories.tracing() as trace:
        model(text[0, 1 - rank][None], memories, add_knn_memory=False)
    return [cited.best[0].position for cited in trace.citations(0, top=1)]


def test_what_another_rank_read_is_cited_by_its_place_in_the_document(two: Processes) -> None:
    """Of 24 tokens at a time rank 0 reads the first twelve, rank 1 the others."""
    first, second = two.run(citations_by_rank)
    assert first == list(range(12, 24)) and second == list(range(12))
