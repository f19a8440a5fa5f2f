"""The snippets of upstream's README run with nothing changed but the import line."""

from __future__ import annotations

import pytest
import torch

MODEL = """
import torch
from memtrans import MemorizingTransformer

model = MemorizingTransformer(
    num_tokens = 20000,                 # number of tokens
    dim = 512,                          # dimension
    dim_head = 64,                      # dimension per attention head
    depth = 8,                          # number of layers
    memorizing_layers = (4, 5),         # which layers to have ANN memories
    max_knn_memories = 64000,
    num_retrieved_memories = 32,        # number of ANN memories to retrieve
    clear_memories_on_sos_token_id = 1,
)

data = torch.randint(0, 20000, (2, 1024)) # mock data

knn_memories = model.create_knn_memories(batch_size = 2)

logits = model(data, knn_memories = knn_memories) # (1, 1024, 20000)
"""

READ_ONLY = """
logits = model(data, knn_memories = knn_memories, add_knn_memory = False) # knn memories will not be updated
"""

XL_MEMORIES = """
import torch
from memtrans import MemorizingTransformer

model = MemorizingTransformer(
    num_tokens = 20000,
    dim = 512,
    depth = 8,
    memorizing_layers = (4, 5),
    max_knn_memories = 64000,
    num_retrieved_memories = 32,
    clear_memories_on_sos_token_id = 1,
    xl_memory_layers = (2, 3, 4, 5),
    xl_max_memories = 512,                # number of xl memories to keep
    shift_knn_memories_down = 1,          # let a layer look at the KNN memories this number of layers above
    shift_xl_memories_down = 1,
)

data = torch.randint(0, 20000, (2, 1024)) # mock data

xl_memories = None

with model.knn_memories_context(batch_size = 2) as knn_memories:
    logits1, xl_memories = model(data, knn_memories = knn_memories, xl_memories = xl_memories)
    logits2, xl_memories = model(data, knn_memories = knn_memories, xl_memories = xl_memories)
    logits3, xl_memories = model(data, knn_memories = knn_memories, xl_memories = xl_memories)

    # ... and so on
"""

MEMORY = """
import torch
from memtrans import KNNMemory

memory = KNNMemory(
    dim = 64,                   # dimension of key / values
    max_memories = 64000,
    num_indices = 2
)

memory.add(torch.randn(2, 512, 2, 64))  # (batch, seq, key | value, feature dim)
memory.add(torch.randn(2, 512, 2, 64))

memory.clear([0]) # clear batch 0, if it saw an <sos>

memory.add(torch.randn(2, 512, 2, 64))
memory.add(torch.randn(2, 512, 2, 64))

key_values, mask = memory.search(torch.randn(2, 512, 64), topk = 32)
"""


@pytest.fixture(autouse=True)
def seeded_without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def test_the_model_and_the_read_only_call():
    names: dict = {}
    exec(MODEL, names)
    assert names["logits"].shape == (2, 1024, 20000)
    lengths = [memory.lengths.tolist() for memory in names["knn_memories"]]
    assert lengths == [[1024, 1024]] * 2
    exec(READ_ONLY, names)
    assert names["logits"].isfinite().all()
    assert [memory.lengths.tolist() for memory in names["knn_memories"]] == lengths


def test_the_model_with_xl_memories():
    names: dict = {}
    exec(XL_MEMORIES, names)
    assert names["logits3"].shape == (2, 1024, 20000)
    assert [tuple(cache.shape) for cache in names["xl_memories"]] == [(2, 512, 2, 64)] * 4


def test_the_memory_alone():
    names: dict = {}
    exec(MEMORY, names)
    assert names["key_values"].shape == (2, 512, 32, 2, 64)
    assert names["mask"].shape == (2, 512, 32) and names["mask"].all()
    assert names["memory"].lengths.tolist() == [1024, 2048]
