"""What only a GPU can show: no host round trips, graphs, streams, addresses beyond 2^31, and the CPU's results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers.checks import GPU_MODEL, assert_close

from memtrans import KNNAttention, KNNMemory, MemorizingTransformer
from memtrans_kernels import knn_add_, knn_search

pytestmark = pytest.mark.gpu

BATCH, SEGMENT, CAPACITY, WIDTH, NEIGHBOURS = 4, 64, 150, 64, 8


@contextmanager
def no_host_round_trip() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def read_segment(memory: KNNMemory, pairs: torch.Tensor, query: torch.Tensor, fresh: torch.Tensor):
    """Clear, search, add: what a training step does to a memory."""
    memory.clear_rows(fresh)
    snapshot = memory.snapshot(like=query, longest=SEGMENT)
    found = snapshot.nearest(query, NEIGHBOURS)
    memory.add(pairs)
    return found


def segments(count: int) -> list[tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    return [
        (
            torch.randn(BATCH, SEGMENT, 2, WIDTH, dtype=torch.float16),
            torch.randn(BATCH, 2, SEGMENT, WIDTH, dtype=torch.float16),
            torch.arange(BATCH) == index,
        )
        for index in range(count)
    ]


def assert_same(actual: list[tuple[torch.Tensor, ...]], expected: list[tuple[torch.Tensor, ...]]) -> None:
    for found, wanted in zip(actual, expected, strict=True):
        for tensor, other in zip(found, wanted, strict=True):
            assert torch.equal(tensor, other)


def expected_results(inputs: list[tuple[torch.Tensor, ...]]) -> list[tuple[torch.Tensor, ...]]:
    memory = KNNMemory(WIDTH, CAPACITY, BATCH, device="cuda", spare=SEGMENT)
    return [read_segment(memory, *step) for step in inputs]


def test_clear_search_and_add_never_wait_for_the_device():
    inputs = segments(5)
    memory = KNNMemory(WIDTH, CAPACITY, BATCH, device="cuda", spare=SEGMENT)
    read_segment(memory, *inputs[0])  # compiles what has to be compiled
    with no_host_round_trip():
        for step in inputs[1:]:
            read_segment(memory, *step)
    assert memory.lengths.tolist() == [min(CAPACITY, (5 - row) * SEGMENT) for row in range(BATCH)]


def test_a_captured_graph_replays_over_segments_that_wrap():
    inputs = segments(7)
    expected = expected_results(inputs)
    memory = KNNMemory(WIDTH, CAPACITY, BATCH, device="cuda", spare=SEGMENT)
    static = [tensor.clone() for tensor in inputs[0]]
    warm_up = KNNMemory(WIDTH, CAPACITY, BATCH, device="cuda", spare=SEGMENT)
    read_segment(warm_up, *static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = read_segment(memory, *static)
    actual = []
    for step in inputs:
        for buffer, tensor in zip(static, step, strict=True):
            buffer.copy_(tensor)
        graph.replay()
        actual.append(tuple(tensor.clone() for tensor in found))
    assert_same(actual, expected)


def test_a_stream_of_ones_own():
    inputs = segments(4)
    expected = expected_results(inputs)
    torch.cuda.synchronize()
    memory = KNNMemory(WIDTH, CAPACITY, BATCH, device="cuda", spare=SEGMENT)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = [read_segment(memory, *step) for step in inputs]
    stream.synchronize()
    assert_same(actual, expected)


def test_more_than_two_to_the_31_elements_in_one_memory():
    """17 rows of 2^20 + 64 slots of 128 numbers: the last row lies beyond 2^31 elements."""
    rows, capacity = 17, 2**20
    keys = torch.empty(rows, capacity + 64, 128, dtype=torch.float16)
    values = torch.empty_like(keys)
    assert keys[:-1].numel() > 2**31
    cursor = torch.full((rows,), capacity + 32)
    start = cursor - 100
    row = torch.tensor([rows - 1])
    new = torch.nn.functional.normalize(torch.randn(1, 1, 64, 128), dim=-1).half()
    before = keys[: rows - 1, :64].clone()
    knn_add_(keys, values, cursor, row, new, -new)
    scores, slots = knn_search(new, keys, row, cursor - 64, cursor, capacity, 1)
    assert slots.flatten().tolist() == [(capacity + 32 + j) % (capacity + 64) for j in range(64)]
    assert torch.equal(values[rows - 1, slots.flatten().long()], -new[0, 0])
    assert torch.equal(keys[: rows - 1, :64].view(torch.int16), before.view(torch.int16))
    assert (scores > 0.99).all()
    assert start.numel() == rows


@pytest.mark.parametrize(
    "configuration",
    [
        {},
        {"xl_max_memories": SEGMENT},
        {"kv_heads": 2, "memory_offset": -1.0},
        {"combine": "gate"},
        {"memory_query": "own", "memory_offset": -1.0},
    ],
)
def test_the_model_gives_what_it_gives_on_the_cpu(configuration):
    torch.manual_seed(0)
    options = {"num_tokens": 100, "dim": 64, "depth": 3, "dim_head": 32, "heads": 2, "memorizing_layers": (2, 3)}
    tokens = torch.randint(1, 100, (BATCH, 4, SEGMENT))
    on_gpu = MemorizingTransformer(**options, **configuration, max_knn_memories=CAPACITY)
    with torch.device("cpu"):
        on_cpu = MemorizingTransformer(**options, **configuration, max_knn_memories=CAPACITY)
    on_cpu.load_state_dict(on_gpu.state_dict())
    results = []
    for model, device in ((on_cpu, "cpu"), (on_gpu, "cuda")):
        memories = model.create_knn_memories(batch_size=BATCH, dtype=torch.float32)
        xl_memories, losses = None, []
        for segment in tokens.to(device).unbind(1):
            loss = model(segment, memories, xl_memories, labels=segment)
            if model.num_xl_memory_layers:
                loss, xl_memories = loss
            loss.backward()
            losses.append(loss.detach().cpu())
        gradients = [parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None]
        results.append([torch.stack(losses), *gradients])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, GPU_MODEL)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_second_gpu_gives_what_the_first_gives_while_the_first_is_current():
    results = []
    for device in ("cuda:0", "cuda:1"):
        torch.manual_seed(0)
        layer = KNNAttention(dim=64, heads=2, dim_head=32, num_retrieved_memories=NEIGHBOURS).to(device)
        memory = KNNMemory(32, CAPACITY, BATCH, device=device)
        for x in torch.randn(3, BATCH, SEGMENT, 64).to(device):
            out, _ = layer(x, knn_memory=memory)
            out.square().sum().backward()
        assert torch.cuda.current_device() == 0
        results.append([out.cpu(), *(parameter.grad.cpu() for parameter in layer.parameters())])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
