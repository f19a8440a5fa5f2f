"""The model is one graph that does what eager does: wrapping memories, caches, checkpointing, late backwards."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.checks import SAME_GRAPH, assert_close
from helpers.devices import seeded
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from memtrans import MemorizingTransformer

BATCH, SEGMENT, CAPACITY = 2, 12, 29
SMALL = {"num_tokens": 50, "dim": 16, "depth": 3, "dim_head": 8, "heads": 2, "num_retrieved_memories": 4, "pad_id": -1}
ONE_LAYER = {**SMALL, "depth": 1, "memorizing_layers": 1}
CACHED = {
    "memorizing_layers": (2, 3),
    "xl_max_memories": SEGMENT,
    "shift_knn_memories_down": 1,
    "shift_xl_memories_down": 1,
    "clear_memories_on_sos_token_id": 7,
    "clear_memories_on_eos_token_id": 8,
}
CONFIGURATIONS = {
    "gate, activation checkpointing": {
        "memorizing_layers": (1, 2),
        "depth": 2,
        "combine": "gate",
        "activation_checkpointing": True,
    },
    "a query of the memory's own": {**ONE_LAYER, "memory_query": "own", "memory_offset": -1.0},
}
# The compiler takes its time.
MORE_CONFIGURATIONS = {
    "cache, shifts, start tokens, per-head memory with an offset": {
        **CACHED,
        "memorizing_layers": (1, 2),
        "depth": 2,
        "kv_heads": 2,
        "memory_offset": -1.0,
    },
    "memory": {"memorizing_layers": (2, 3)},
    "memory, cache, shifts, start tokens": CACHED,
    "activation checkpointing": {"memorizing_layers": (2,), "activation_checkpointing": True},
    "gate": {"memorizing_layers": (2,), "combine": "gate"},
    "all entries, cache": {"memorizing_layers": (2, 3), "attend_to": "all", "xl_max_memories": SEGMENT},
    "per-head memory with an offset": {"memorizing_layers": (2,), "kv_heads": 2, "memory_offset": -1.0},
    "a query of the memory's own, all entries": {"memory_query": "own", "attend_to": "all", "memory_offset": -1.0},
    "a query of the memory's own, activation checkpointing": {"memory_query": "own", "activation_checkpointing": True},
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch.manual_seed(0)


def tokens() -> torch.Tensor:
    return torch.randint(0, 50, (BATCH, 5 * SEGMENT + 1), generator=seeded(1))


def read(model, forward, memories):
    """Five segments, then one backward: the losses and gradients of it all."""
    xl_memories, losses = None, []
    lengths, xl_length = torch.tensor([SEGMENT, SEGMENT - 1]), torch.tensor([SEGMENT, 3])
    for segment in range(5):
        here = tokens()[:, segment * SEGMENT : (segment + 1) * SEGMENT]
        labels = tokens()[:, segment * SEGMENT + 1 : (segment + 1) * SEGMENT + 1]
        extra = {"xl_memories": xl_memories, "xl_length": xl_length} if model.num_xl_memory_layers else {}
        loss = forward(here, knn_memories=memories, labels=labels, lengths=lengths, **extra)
        if model.num_xl_memory_layers:
            loss, xl_memories = loss
        losses.append(loss)
    model.zero_grad()
    sum(losses).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"losses": torch.stack(losses).detach(), **gradients}


def assert_same_reading(model, compiled_model, spare):
    """Losses, gradients and what the memories hold afterwards."""
    memories = [model.create_knn_memories(batch_size=BATCH, spare=spare) for _ in range(2)]
    expected = read(model, model, memories[0])
    actual = read(model, compiled_model, memories[1])
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(actual[name], tensor, SAME_GRAPH, name)
    for eager, compiled in zip(*memories, strict=True):
        for name, tensor in eager.state_dict().items():
            assert_close(compiled.state_dict()[name], tensor, SAME_GRAPH, name)


@pytest.mark.parametrize(
    "configuration",
    [
        *(pytest.param(options, id=name) for name, options in CONFIGURATIONS.items()),
        *(pytest.param(options, id=name, marks=pytest.mark.slow) for name, options in MORE_CONFIGURATIONS.items()),
    ],
)
def test_one_graph_equals_eager(configuration):
    model = MemorizingTransformer(**{**SMALL, **configuration}, max_knn_memories=CAPACITY)
    assert_same_reading(model, torch.compile(model, fullgraph=True, backend="aot_eager"), 5 * SEGMENT)


@torch.no_grad()
def test_one_graph_reads_rows_with_padding_in_the_middle_of_their_documents():
    """What the XL memories say of themselves comes out of the graph and goes into the next one."""
    options = {**SMALL, **CACHED, "depth": 2, "memorizing_layers": (1, 2)}
    model = MemorizingTransformer(**options, max_knn_memories=CAPACITY).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    memories = [model.create_knn_memories(batch_size=BATCH) for _ in range(2)]
    left = right = None
    for segment, lengths in enumerate(torch.tensor([[5, SEGMENT], [SEGMENT, 0], [3, 4], [SEGMENT, SEGMENT]])):
        here = tokens()[:, segment * SEGMENT : (segment + 1) * SEGMENT]
        expected, left = model(here, memories[0], left, lengths=lengths)
        actual, right = compiled(here, memories[1], right, lengths=lengths)
        assert_close(actual, expected, SAME_GRAPH)
        assert torch.equal(right.length, left.length)
    for eager, graph in zip(*memories, strict=True):
        assert torch.equal(graph.lengths, eager.lengths)


def test_one_graph_serves_memories_of_every_size():
    """From the second size on the compiler takes sizes as symbols."""
    model = MemorizingTransformer(**ONE_LAYER, max_knn_memories=CAPACITY)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for capacity in (CAPACITY, CAPACITY + 3, CAPACITY + 14):
        model.max_knn_memories = capacity
        assert_same_reading(model, compiled, 5 * SEGMENT)


def counted(**options):
    """A model of one memorizing layer, the same compiled, and what counts its graphs."""
    graphs = CompileCounterWithBackend("aot_eager")
    model = MemorizingTransformer(**ONE_LAYER, max_knn_memories=CAPACITY)
    return model, torch.compile(model, fullgraph=True, backend=graphs, **options), graphs


def read_lengths(model, forward, spare, lengths):
    """A segment of each length with a backward of its own: losses, gradients and what the memory holds."""
    (memory,) = memories = model.create_knn_memories(batch_size=BATCH, spare=spare)
    model.zero_grad()
    losses = []
    for length in lengths:
        losses.append(forward(tokens()[:, :length], memories, labels=tokens()[:, 1 : length + 1]))
        losses[-1].backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"losses": torch.stack(losses).detach(), **gradients, **memory.state_dict()}


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
def test_one_graph_serves_segments_of_every_length(dynamic):
    """From the second length on it is a symbol.

    The lengths are no other size of the model, which the compiler would take for the same symbol.
    """
    model, compiled, graphs = counted(dynamic=dynamic)
    lengths = (9, 15, 11)
    expected = read_lengths(model, model, 15, lengths)
    actual = read_lengths(model, compiled, 15, lengths)
    for name, tensor in expected.items():
        assert_close(actual[name], tensor, SAME_GRAPH, name)
    assert graphs.frame_count <= 2


@pytest.mark.slow
def test_a_graph_for_segments_of_every_length_asks_each_memory_for_its_room():
    """A memory with less spare than the one that the graph was made for grows, too: its backward is not too late."""
    model, compiled, _ = counted()
    for spare in (15, 20, 9):
        expected = read_lengths(model, model, spare, (9, 15))
        actual = read_lengths(model, compiled, spare, (9, 15))
        for name, tensor in expected.items():
            assert_close(actual[name], tensor, SAME_GRAPH, name)


def test_one_graph_serves_a_new_memory_for_each_document():
    """Where device and spare are given, so that a memory is laid out when it is made.

    A default device changes nothing: compiler and memory see a mode then.
    """
    _, compiled, graphs = counted()
    with torch.device("cpu"):
        for _ in range(4):
            memories = compiled.create_knn_memories(batch_size=BATCH, device="cpu", spare=SEGMENT)
            for _ in range(2):
                compiled(tokens()[:, :SEGMENT], memories, labels=tokens()[:, :SEGMENT]).backward()
            assert memories[0].lengths.tolist() == [2 * SEGMENT] * BATCH
    assert graphs.frame_count == 1


def test_what_inductor_generates_equals_eager_and_never_copies_the_memory():
    """60 entries through a capacity of 29. No buffer of the generated code has the ring's shape: 97 slots."""
    model = MemorizingTransformer(**ONE_LAYER, max_knn_memories=CAPACITY)
    compiled = torch.compile(model, fullgraph=True)
    _, code = run_and_get_code(assert_same_reading, model, compiled, 97 - CAPACITY)
    generated = "\n".join(code)
    assert "knn_add_" in generated and "memory_attention_backward" in generated
    assert re.search(r"\b97\b", generated), "the ring is an argument of the graph"
    allocations = [line for line in generated.splitlines() if "empty_strided" in line and re.search(r"\b97\b", line)]
    assert not allocations


def test_a_compiled_backward_that_comes_too_late_is_an_error_that_names_spare():
    model = MemorizingTransformer(**ONE_LAYER, max_knn_memories=CAPACITY)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    memories = model.create_knn_memories(batch_size=BATCH, spare=2 * SEGMENT)
    losses = [compiled(tokens()[:, :SEGMENT], memories, labels=tokens()[:, :SEGMENT]) for _ in range(3)]
    with pytest.raises(RuntimeError, match=f"spare={2 * SEGMENT} slots keep what a forward pass retrieved"):
        losses[0].backward()
