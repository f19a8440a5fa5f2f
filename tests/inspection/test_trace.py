"""What a trace says of a memory at work, against one softmax in float64 over everything that a document ever stored."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checks import SAME_FORMULA, assert_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memtrans import KNNAttention, KNNMemory, KNNMemoryList, MemorizingTransformer, generate
from memtrans.inspection.trace import Trace
from memtrans.memory.observation import Observation
from memtrans_kernels import cosine

B, H, N, K, D, M, DIM = 2, 4, 5, 3, 8, 11, 12


@dataclass
class Document:
    """One row as the definition has it: everything that it stored, and what is still in its XL cache; (G, n, D)."""

    groups: int
    stored: list[Tensor] = field(default_factory=list)  # keys (G, D), in their order
    cached: list[Tensor] = field(default_factory=list)

    def weights(self, layer: KNNAttention, query: Tensor, key: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Of query (H, N, D), with the segment's keys (G, N, D): to all stored (H, N, stored), to all local keys."""
        group = torch.arange(H) // (H // self.groups)
        local = torch.stack([*self.cached, *key.unbind(1)], dim=1)[group]  # (H, L, D)
        length, local_keys, scale = query.shape[1], local.shape[1], layer.temperature()[:, None, None]
        distance = torch.arange(local_keys - length, local_keys)[:, None] - torch.arange(local_keys)
        apart = distance if layer.causal else distance.abs()
        to_local = capped(layer, scale * query @ local.mT) + table[:, apart.clamp(0, table.shape[1] - 1)]
        if layer.causal:
            to_local = to_local.masked_fill(distance < 0, -torch.inf)
        to_memory = torch.full((H, length, len(self.stored)), -torch.inf, dtype=torch.float64)
        first = max(0, len(self.stored) - M)
        if self.stored:
            scores = query @ torch.stack(self.stored, dim=1)[group, first:].mT
            best = scores.topk(min(K, scores.shape[2]), dim=2)
            logits = capped(layer, scale * best.values)
            if layer.memory_offset is not None:
                logits = logits + layer.memory_offset[:, None, None]
            to_memory[:, :, first:] = to_memory[:, :, first:].scatter(2, best.indices, logits)
        if layer.memory_gate is None:
            parts = [to_memory, to_local]
            if layer.sink is not None:
                parts.append(layer.sink[:, None, None].expand(H, length, 1))
            return (
                torch.cat(parts, dim=2)
                .softmax(2)[..., : len(self.stored) + local_keys]
                .split([len(self.stored), local_keys], dim=2)
            )
        gate = layer.memory_gate.sigmoid()[:, None, None] if self.stored else torch.zeros(H, 1, 1).double()
        memory = to_memory.softmax(2) if self.stored else to_memory
        return gate * memory, (1 - gate) * to_local.softmax(2)

    def go_on(self, key: Tensor, kept: int) -> None:
        """Stores what leaves the XL cache of a segment's keys (G, N, D)."""
        local = [*self.cached, *key.unbind(1)]
        leaving = max(0, len(local) - kept)
        self.stored += local[:leaving]
        self.cached = local[leaving:]


def capped(layer: KNNAttention, products: Tensor) -> Tensor:
    return products if layer.soft_cap is None else layer.soft_cap * (products / layer.soft_cap).tanh()


def dense(positions: Tensor, weights: Tensor, stored: int) -> Tensor:
    """Weights (H, Q, K) by position (H, Q, stored)."""
    by_position = torch.zeros(*weights.shape[:2], stored + 1, dtype=weights.dtype)
    return by_position.scatter_add(2, positions + 1, weights)[..., 1:]


def memory_of(groups: int, **options: Any) -> KNNMemory:
    return KNNMemory(D, M, B, kv_heads=groups, dtype=torch.float64, device="cpu", spare=N + 3, **options)


@pytest.mark.cpu
@pytest.mark.parametrize("cached", [0, 7])
@pytest.mark.parametrize("groups", [1, 2, H])
@pytest.mark.parametrize("form", [{}, {"memory_offset": -0.5}, {"combine": "gate"}, {"soft_cap": 3.0}, {"sink": True}])
@pytest.mark.parametrize("keep_ids", [False, True])
@torch.no_grad()
def test_weights_are_those_of_the_definition(
    form: dict[str, Any], groups: int, cached: int, keep_ids: bool, tmp_path: Path
) -> None:
    """Through segments that fill the ring, go round it, clear a row, and read on in a memory that was saved."""
    torch.manual_seed(0)
    layer = KNNAttention(
        dim=DIM, heads=H, dim_head=D, num_retrieved_memories=K, xl_max_memories=cached, kv_heads=groups, **form
    ).double()
    if layer.memory_gate is not None:
        layer.memory_gate.normal_()
    table, documents = torch.randn(H, 6, dtype=torch.float64), [Document(groups) for _ in range(B)]
    memories, xl_memory = KNNMemoryList([memory_of(groups, keep_ids=keep_ids)]), None
    before = [0] * B  # stored when the memory was saved: there positions begin anew without ids
    for segment in range(9):
        if segment == 5:
            memories.clear_rows(torch.tensor([True, False]))
            documents[0] = Document(groups)
        if segment == 7:
            memories.save(tmp_path / "memories.safetensors")
            memories = KNNMemoryList.load(tmp_path / "memories.safetensors", device="cpu")
            before = [0 if keep_ids else max(0, len(document.stored) - M) for document in documents]
        x = torch.randn(B, N, DIM, dtype=torch.float64)
        query, key, _ = layer.project(x)
        query, key = cosine(query, key)
        held = torch.tensor([len(document.cached) for document in documents]) + N
        with memories.tracing(local=True) as trace:
            _, xl_memory = layer(x, knn_memory=memories[0], xl_memory=xl_memory, rel_pos_bias=table, local_length=held)
        for row, document in enumerate(documents):
            to_memory, to_local = document.weights(layer, query[row], key[row], table)
            positions = trace.positions(row, 0)
            found = dense(
                positions.where(positions < 0, positions + before[row]), trace.weights(row, 0), len(document.stored)
            )
            assert_close(found, to_memory, SAME_FORMULA, f"weights in segment {segment}")
            local = trace.local_weights(row, 0)[0]
            assert_close(local[..., -int(held[row]) :], to_local, SAME_FORMULA, "local weights")
            assert not local[..., : -int(held[row])].any()
            document.go_on(key[row], cached)
    assert len(documents[1].stored) > 2 * M


def small_model(**options: Any) -> MemorizingTransformer:
    torch.manual_seed(0)
    return (
        MemorizingTransformer(
            num_tokens=40, dim=16, depth=3, dim_head=8, heads=2, memorizing_layers=(1, 3), max_knn_memories=19,
            num_retrieved_memories=4, pad_id=-1, **options,
        ).double().eval()
    )  # fmt: skip


def memories_of(model: MemorizingTransformer, batch: int) -> KNNMemoryList:
    return model.create_knn_memories(batch_size=batch, dtype=torch.float64, spare=16)


@pytest.mark.cpu
@pytest.mark.parametrize("options", [{}, {"xl_max_memories": 6}, {"combine": "gate", "kv_heads": 2}])
@torch.no_grad()
def test_generate_is_traced_as_a_pass_over_the_same_text(options: dict[str, Any]) -> None:
    model, segment = small_model(**options), 8
    prompts = [torch.arange(29) % 40, torch.arange(13) * 3 % 40]
    memories = memories_of(model, 2)
    with memories.tracing() as trace:
        new = generate(model, prompts, tokens=9, segment=segment, memories=memories)
    for row, prompt in enumerate(prompts):
        text = torch.cat((prompt, new[row, :-1]))
        whole, xl_memories = memories_of(model, 1), None
        with whole.tracing() as expected:
            for part in text.split(segment):
                result = model(part[None], whole, xl_memories)
                xl_memories = result[1] if model.num_xl_memory_layers else None
        for layer in trace.layers:
            assert torch.equal(trace.positions(row, layer), expected.positions(0, layer))
            assert_close(trace.weights(row, layer), expected.weights(0, layer), SAME_FORMULA, "weights")
        assert_close(trace.memory_share(row), expected.memory_share(0), SAME_FORMULA, "shares")


class Kernels(TorchDispatchMode):
    """The operators that run, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def kernels_of(model: MemorizingTransformer, memories: KNNMemoryList) -> list[str]:
    with Kernels() as kernels:
        model(torch.arange(8)[None], memories)
    return kernels.names


@torch.no_grad()
def test_a_memory_that_nobody_watches_runs_the_kernels_that_it_ran_before() -> None:
    model = small_model()
    memories = memories_of(model, 1)
    model(torch.arange(8)[None], memories)
    before = kernels_of(model, memories)
    with memories.tracing():
        traced = kernels_of(model, memories)
    assert kernels_of(model, memories) == before
    assert len(traced) > len(before)


def test_a_forward_pass_that_the_backward_pass_runs_again_is_noted_once() -> None:
    model = small_model(activation_checkpointing=True).train()
    memories = memories_of(model, 1)
    with memories.tracing() as trace:
        for _ in range(2):
            model(torch.arange(8)[None], memories, labels=torch.arange(8)[None]).backward()
    assert trace.weights(0, 0).shape[1] == 16


@torch.no_grad()
def test_rows_are_documents_also_in_a_scope() -> None:
    model = small_model()
    memories = memories_of(model, 3)
    model(torch.arange(24).view(3, 8), memories)
    with memories.tracing() as trace, memories.at_batch_indices([2, 0]):
        model(torch.arange(16, 32).view(2, 8), memories)
    assert trace.positions(2, 0).shape == trace.positions(0, 1).shape == (2, 8, 4)
    with pytest.raises(ValueError, match="row must be one that was read while the memory was traced, got 1"):
        trace.positions(1, 0)
    with pytest.raises(ValueError, match=r"layer must be one that was traced, \[0, 1\], got 2"):
        trace.positions(0, 2)
    with pytest.raises(ValueError, match="local must be True"):
        trace.local_weights(0, 0)


def test_a_memory_has_one_trace_at_a_time_and_none_behind_an_error() -> None:
    memories = memories_of(small_model(), 1)
    with (
        pytest.raises(ValueError, match="watched by one trace at a time"),
        memories.tracing(),
        memories.tracing(),
    ):
        pass
    with memories.tracing():
        assert copy.deepcopy(memories)[0].watch.tell is None  # a copy is not what is traced
    assert all(memory.watch.tell is None for memory in memories)


def test_what_every_query_finds_stands_apart() -> None:
    """Entry 3 is near every query, entry 20 + i near query i alone."""
    trace, queries = Trace(), 9
    positions = torch.stack((torch.full((queries,), 3), 20 + torch.arange(queries)), dim=1)
    weights = torch.tensor([[0.25, 0.5]]).repeat(queries, 1)
    weights[0, 1] = 0.75
    trace.watcher(0)(Observation(torch.tensor([0]), positions[None, None], weights[None, None]))
    for query, cited in enumerate(trace.citations(0)):
        assert [citation.position for citation in cited.best] == [20 + query]
        assert [citation.position for citation in cited.usual] == [3]
        assert cited.usual[0].background == pytest.approx(0.25)
        assert cited.share == pytest.approx(0.75 if query else 1.0)
    assert [(passage.begin, passage.end) for passage in trace.passages(0, top=3)] == [(20, 29)]
    assert trace.passages(0, queries=[4])[0].positions == (24,)


@torch.no_grad()
def test_rows_of_a_view_are_its_questions() -> None:
    model = small_model()
    memories = memories_of(model, 2)
    model(torch.arange(16).view(2, 8), memories)
    questions = torch.arange(12).view(4, 3)
    with memories.tracing() as trace:
        model(questions, memories.expand(4), add_knn_memory=False)
    for row in range(4):
        with memories.at_batch_indices([row // 2]), memories.tracing() as alone:
            model(questions[row : row + 1], memories, add_knn_memory=False)
        assert torch.equal(trace.positions(row, 1), alone.positions(row // 2, 1))
        assert_close(trace.weights(row, 1), alone.weights(row // 2, 1), SAME_FORMULA, "weights")
