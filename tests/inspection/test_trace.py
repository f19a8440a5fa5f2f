"""What a trace says of a memory at work, against one softmax in float64 over everything that a document ever stored."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checks import SAME_FORMULA, assert_close
from helpers.definition import Document, begun, dense
from torch.utils._python_dispatch import TorchDispatchMode

from memtrans import KNNAttention, KNNMemory, KNNMemoryList, MemorizingTransformer, generate
from memtrans.inspection.trace import Trace
from memtrans.memory.observation import Observation
from memtrans_kernels import cosine

B, H, N, K, D, M, DIM = 2, 4, 5, 3, 8, 11, 12


def memory_of(groups: int, **options: Any) -> KNNMemory:
    return KNNMemory(D, M, B, kv_heads=groups, dtype=torch.float64, device="cpu", spare=N + 3, **options)


OWN = {"memory_query": "own"}
CAUSAL = [{}, {"memory_offset": -0.5}, {"combine": "gate"}, {"soft_cap": 3.0}, {"sink": True}, OWN]
FORMS: list[dict[str, Any]] = [
    *(form | {"xl_max_memories": cached} for form in CAUSAL for cached in (0, 7)),
    *(form | {"causal": False} for form in CAUSAL),  # which have no cache
]


@pytest.mark.cpu
@pytest.mark.parametrize("groups", [1, 2, H])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keep_ids", [False, True])
@torch.no_grad()
def test_weights_are_those_of_the_definition(form: dict[str, Any], groups: int, keep_ids: bool, tmp_path: Path) -> None:
    """Through segments that fill the ring, go round it, clear a row, and read on in a memory that was saved."""
    torch.manual_seed(0)
    sizes = {"dim": DIM, "heads": H, "dim_head": D, "num_retrieved_memories": K, "kv_heads": groups}
    layer = begun(KNNAttention(**sizes, **form).double())
    table, documents = torch.randn(H, 6, dtype=torch.float64), [Document(layer, M) for _ in range(B)]
    memories, xl_memory = KNNMemoryList([memory_of(groups, keep_ids=keep_ids)]), None
    before = [0] * B  # stored when the memory was saved: there positions begin anew without ids
    for segment in range(9):
        if segment == 5:
            memories.clear_rows(torch.tensor([True, False]))
            documents[0] = Document(layer, M)
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
            to_memory, to_local = document.weights(query[row], key[row], table)
            positions = trace.positions(row, 0)
            found = dense(
                positions.where(positions < 0, positions + before[row]), trace.weights(row, 0), len(document.stored)
            )
            assert_close(found, to_memory, SAME_FORMULA, f"weights in segment {segment}")
            local = trace.local_weights(row, 0)[0]
            assert_close(local[..., -int(held[row]) :], to_local, SAME_FORMULA, "local weights")
            assert not local[..., : -int(held[row])].any()
            document.go_on(key[row], layer.xl_max_memories)
    assert len(documents[1].stored) > 2 * M


@pytest.mark.cpu
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("form", [{}, {"xl_max_memories": 7}, {"causal": False}, {"combine": "gate", "causal": False}])
@torch.no_grad()
def test_of_rows_with_padding_it_says_the_same_by_the_places_of_their_tokens(form: dict[str, Any], groups: int) -> None:
    """Padding before the text, behind it and inside it looks at nothing and is not looked at."""
    torch.manual_seed(0)
    layer = KNNAttention(dim=DIM, heads=H, dim_head=D, num_retrieved_memories=K, kv_heads=groups, **form).double()
    table, documents = torch.randn(H, 6, dtype=torch.float64), [Document(layer, M) for _ in range(B)]
    memories, cache = KNNMemoryList([memory_of(groups)]), {}
    masks = torch.tensor([[[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]], [[1, 0, 1, 0, 1], [1, 1, 1, 1, 1]]]).bool()
    for mask in masks.repeat(4, 1, 1):
        x, held = torch.randn(B, N, DIM, dtype=torch.float64), [len(document.cached) for document in documents]
        if cache:
            cache["local_length"] = torch.tensor(held) + N
        with memories.tracing(local=True) as trace:
            _, xl_memory = layer(x, knn_memory=memories[0], rel_pos_bias=table, mask=mask, **cache)
        for row, (document, real) in enumerate(zip(documents, mask, strict=True)):
            query, key = (vectors[0] for vectors in cosine(*layer.project(x[row, real][None])[:2]))
            to_memory, to_local = document.weights(query, key, table)
            found = dense(trace.positions(row, 0), trace.weights(row, 0), len(document.stored))
            assert_close(found[:, real], to_memory, SAME_FORMULA, "weights")
            local = trace.local_weights(row, 0)[0]
            seen = torch.cat((torch.arange(local.shape[2] - N) >= local.shape[2] - N - held[row], real))
            assert_close(local[:, real][..., seen], to_local, SAME_FORMULA, "local weights")
            assert not found[:, ~real].any() and not local[:, ~real].any() and not local[..., ~seen].any()
            document.go_on(key, layer.xl_max_memories)
        cache = {} if xl_memory is None else {"xl_memory": xl_memory}


@pytest.mark.cpu
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_a_models_padding_is_no_query_of_another_token(causal: bool) -> None:
    model, tokens = small_model(causal=causal), torch.arange(1, 9)[None]
    mask = torch.tensor([[True, True, False, True, False, True, True, True]])
    memories, others = memories_of(model, 1), memories_of(model, 1)
    for memory in (memories, others):
        model(torch.arange(30)[None], memory)
    with memories.tracing() as trace:
        model(tokens, memories, mask=mask)
    with others.tracing() as expected:
        model(tokens[mask][None], others)
    for layer in trace.layers:
        assert torch.equal(trace.positions(0, layer)[:, mask[0]], expected.positions(0, layer))
        assert_close(trace.weights(0, layer)[:, mask[0]], expected.weights(0, layer), SAME_FORMULA, "weights")
        assert (trace.positions(0, layer)[:, ~mask[0]] == -1).all()


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
            of_trace, of_pass = trace.positions(row, layer), expected.positions(0, layer)
            if layer == trace.layers[0]:  # the same token again is the same key there, up to how a machine rounds
                of_trace, of_pass = (torch.where(found < 0, -1, text[found]) for found in (of_trace, of_pass))
            assert torch.equal(of_trace, of_pass)
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


@pytest.mark.cpu
@torch.no_grad()
def test_a_head_a_query_or_a_number_of_places_that_cannot_be_is_named() -> None:
    model = small_model()
    memories = memories_of(model, 1)
    model(torch.arange(9)[None], memories)
    with memories.tracing() as trace:
        model(torch.arange(3)[None], memories)
    assert len(trace.citations(0, head=1)) == 3 and trace.passages(0, queries=[2])
    for call, message in (
        (lambda: trace.citations(0, head=2), r"head must be in \[0, 2\), got 2"),
        (lambda: trace.shares(0, layer=1, head=-1), r"head must be in \[0, 2\), got -1"),
        (lambda: trace.citations(0, top=-1), "top must be at least 0, got -1"),
        (lambda: trace.passages(0, top=-1), "top must be at least 0, got -1"),
        (lambda: trace.passages(0, queries=[3]), r"a query of queries must be in \[0, 3\), got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


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
