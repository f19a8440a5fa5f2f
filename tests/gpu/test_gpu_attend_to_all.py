"""On a GPU attention to all entries is that of float64, waits for nothing on the host, and is replayed as a graph."""

from __future__ import annotations

import pytest
import torch
from helpers.checks import ATTENTION, GPU_MODEL, LSE, assert_close
from helpers.devices import seeded
from torch import Tensor

from memtrans import KNNAttention, KNNMemory, MemorizingTransformer
from memtrans.generation.decoder import Decoder
from memtrans.memory.whole import attend_to_entries, has_kernel

pytestmark = pytest.mark.gpu

B, H, N, D, M = 2, 4, 200, 64, 5000


def filled(dtype: torch.dtype, kv_heads: int, capacity: int = M) -> KNNMemory:
    """One document has wrapped, the other was cleared since and holds less than it may."""
    memory = KNNMemory(D, capacity, B, kv_heads=kv_heads, dtype=dtype, spare=N, device="cuda")
    for number in range(4):
        shape = (B, kv_heads, capacity // 3, 2, D)
        pairs = torch.nn.functional.normalize(torch.randn(shape, generator=seeded(number)), dim=-1) * 1.5
        memory.add(pairs if kv_heads > 1 else pairs[:, 0])
        if number == 1:
            memory.clear([1])
    return memory


def by_hand(memory: KNNMemory, query: Tensor, scale: Tensor, sees: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, over what the memory says that it holds."""
    entries = memory.entries()
    keys, values = (t if memory.kv_heads > 1 else t[:, None] for t in (entries.keys, entries.values))
    keys, values = (t.double().repeat_interleave(H // memory.kv_heads, dim=1) for t in (keys, values))
    logits = scale[:, None, None] * (query @ keys.mT)
    logits = logits.masked_fill(~entries.mask[:, None, None] | ~sees[:, None, :, None], -torch.inf)
    lse = logits.logsumexp(dim=-1)
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    return weights @ values, lse


@pytest.mark.parametrize("capacity", [M, 300])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("dtype", ATTENTION)
def test_results_and_gradients_are_those_of_float64(dtype: torch.dtype, kv_heads: int, capacity: int) -> None:
    memory = filled(dtype, kv_heads, capacity)
    sees = torch.rand(B, N, generator=seeded(5)) < 0.9
    query = torch.nn.functional.normalize(torch.randn(B, H, N, D, generator=seeded(6)), dim=-1).to(dtype)
    grad_out = torch.randn(B, H, N, D, generator=seeded(7)).to(dtype)
    results = []
    for of in (dtype, torch.float64):
        leaves = query.to(of, copy=True).requires_grad_(), (1.0 + torch.arange(H)).to(of, copy=True).requires_grad_()
        if of == torch.float64:
            out, lse = by_hand(memory, *leaves, sees)
        else:
            out, lse = attend_to_entries(memory.snapshot(), *leaves, query_mask=sees)
        out.backward(grad_out.to(of))
        results.append((out, lse.exp(), *(leaf.grad for leaf in leaves)))
    for name, actual, expected in zip(("out", "lse", "query", "scale"), *results, strict=True):
        tolerance = 100 * LSE if name == "lse" and dtype == torch.float32 else ATTENTION[dtype]
        assert_close(actual, expected, tolerance, name)


@torch.no_grad()
@pytest.mark.parametrize("capacity", [M, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_results_without_gradients_come_from_a_kernel_of_their_own(dtype: torch.dtype, capacity: int) -> None:
    memory = filled(dtype, 1, capacity)
    query = torch.nn.functional.normalize(torch.randn(B, H, N, D, generator=seeded(6)), dim=-1).to(dtype)
    scale, snapshot = 1.0 + torch.arange(H), memory.snapshot()
    assert has_kernel(snapshot, query, scale)
    out, lse = attend_to_entries(snapshot, query, scale)
    sees = torch.ones(B, N, dtype=torch.bool)
    expected_out, expected_lse = by_hand(memory, query.double(), scale.double(), sees)
    assert_close(out, expected_out, ATTENTION[dtype], "out")
    assert_close(lse.exp(), expected_lse.exp(), 100 * LSE, "lse")


def layer_of(dtype: torch.dtype) -> KNNAttention:
    torch.manual_seed(0)
    return KNNAttention(dim=128, heads=H, dim_head=D, attend_to="all").to("cuda", dtype)


def test_a_step_waits_for_nothing_and_its_graph_replays_over_segments_that_wrap() -> None:
    layer, inputs = layer_of(torch.bfloat16), torch.randn(9, B, N, 128, generator=seeded(1)).bfloat16()
    expected = []
    memory = KNNMemory(D, 700, B, device="cuda", spare=N)
    for x in inputs:
        expected.append(_gradient(layer, x.clone().requires_grad_(), memory))
    memory, static = KNNMemory(D, 700, B, device="cuda", spare=N), inputs[0].clone().requires_grad_()
    warm_up = KNNMemory(D, 700, B, device="cuda", spare=N)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _gradient(layer, static, warm_up)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = _gradient(layer, static, memory)
    for number, x in enumerate(inputs):
        with torch.no_grad():
            static.copy_(x)
        graph.replay()
        for actual, wanted in zip(found, expected[number], strict=True):
            assert torch.equal(actual, wanted), f"segment {number}"


@torch.no_grad()
def test_a_graph_without_gradients_replays_too() -> None:
    layer, inputs = layer_of(torch.bfloat16), torch.randn(9, B, N, 128, generator=seeded(1)).bfloat16()
    memory = KNNMemory(D, 700, B, device="cuda", spare=N, dtype=torch.bfloat16)
    expected = [layer(x, knn_memory=memory)[0].clone() for x in inputs]
    memory, static = KNNMemory(D, 700, B, device="cuda", spare=N, dtype=torch.bfloat16), inputs[0].clone()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        found, _ = layer(static, knn_memory=memory)
    for number, x in enumerate(inputs):
        static.copy_(x)
        graph.replay()
        assert torch.equal(found, expected[number]), f"segment {number}"


def _gradient(layer: KNNAttention, x: Tensor, memory: KNNMemory) -> tuple[Tensor, Tensor]:
    out, _ = layer(x, knn_memory=memory)
    return out.detach(), *torch.autograd.grad(out.float().square().sum(), [x])


def test_a_decoder_reads_what_the_model_reads() -> None:
    torch.manual_seed(0)
    model = MemorizingTransformer(
        num_tokens=60, dim=64, depth=2, heads=2, dim_head=32, memorizing_layers=2, max_knn_memories=100,
        attend_to="all", xl_max_memories=16, pad_id=-1,
    ).cuda().eval()  # fmt: skip
    ids = torch.randint(0, 60, (1, 96), generator=seeded(2))
    memories, caches, logits = model.create_knn_memories(batch_size=1), None, []
    with torch.no_grad():
        for segment in ids.split(32, dim=1):
            out, caches = model(segment, memories, xl_memories=caches)
            logits.append(out[0])
    expected, decoder = torch.cat(logits), Decoder(model, 1, segment=32)
    assert_close(decoder.read([ids[0, :40]])[0], expected[39], GPU_MODEL)
    for place in range(40, 96):
        assert_close(decoder.step(ids[:, place])[0], expected[place], GPU_MODEL, f"token {place}")
