"""The share of attention that goes to the memory is the weight that its keys have in the softmax."""

from __future__ import annotations

import pytest
import torch

from memtrans import KNNAttention, KNNMemory, KNNMemoryList, MemorizingTransformer
from memtrans.inspection.share import measured_share, memory_fill, watched_shares
from memtrans_kernels import cosine
from tests.helpers.checks import ATTENTION, assert_close

SIZE = {"dim": 16, "heads": 2, "dim_head": 8}


def layer(entries: int = 40, **options) -> tuple[KNNAttention, torch.Tensor, KNNMemory]:
    torch.manual_seed(0)
    attention = KNNAttention(**SIZE, num_retrieved_memories=4, **options).eval()
    memory = KNNMemory(dim=8, max_memories=64, num_indices=3)
    if entries:
        memory.add(torch.nn.functional.normalize(torch.randn(3, entries, 2, 8), dim=-1))
    return attention, torch.randn(3, 5, 16), memory


@torch.no_grad()
def share_of(attention: KNNAttention, x: torch.Tensor, memory: KNNMemory) -> torch.Tensor:
    with watched_shares(KNNMemoryList([memory])) as found:
        attention(x, knn_memory=memory, add_knn_memory=False)
    return found[0]


@pytest.mark.parametrize("offset", [None, -1.5])
@torch.no_grad()
def test_it_is_the_weight_of_the_retrieved_keys_in_the_softmax(offset):
    attention, x, memory = layer(memory_offset=offset)
    query, key = cosine(*attention.project(x)[:2])
    scale = attention.temperature()[None, :, None, None]
    retrieved = memory.snapshot(x).nearest(query, 4)[0] * scale + (offset or 0.0)
    local = (query @ key.transpose(2, 3)) * scale
    local = local.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    weights = torch.cat((retrieved, local), dim=-1).softmax(dim=-1)
    assert_close(share_of(attention, x, memory), weights[..., :4].sum(dim=-1), ATTENTION[torch.float32])


def test_an_empty_memory_gets_nothing_and_a_gate_says_what_it_gets():
    assert share_of(*layer(entries=0)).max() <= ATTENTION[torch.float32]
    attention, x, memory = layer(combine="gate")
    attention.memory_gate.data[:] = torch.tensor([0.0, 2.0])
    expected = torch.sigmoid(attention.memory_gate.detach())[None, :, None].expand(3, 2, 5)
    assert_close(share_of(attention, x, memory), expected, ATTENTION[torch.float32])


def test_the_mean_counts_the_tokens_that_it_is_told_to_and_changes_nothing():
    torch.manual_seed(0)
    model = MemorizingTransformer(
        num_tokens=20, depth=2, memorizing_layers=(1, 2), max_knn_memories=64, num_retrieved_memories=4, **SIZE
    )
    memories = model.create_knn_memories(batch_size=2)
    ids = torch.randint(0, 20, (2, 8))
    assert memory_fill(memories) == 0
    model(ids, knn_memories=memories)
    assert memory_fill(memories) == 8 / 64
    before = memories.state_dict()
    counted = torch.ones(2, 8, dtype=torch.bool)
    share = measured_share(model, memories, lambda: model(ids, memories, add_knn_memory=False), counted)
    assert 0 < share < 1
    assert all(torch.equal(tensor, memories.state_dict()[name]) for name, tensor in before.items())
    assert measured_share(model, memories, lambda: None, ~counted) is None
    assert model.training
