"""A pretrained model with a memory in all its layers: reading documents, and tokens written one by one.

The model has the shape of SmolLM2-135M (30 layers, 9 heads, 3 key/value heads, width 64) and random weights, which
decide nothing here. A case is `<read|token>-<off|64k>[-b4]`. Reading is one segment of 512 tokens for each document, no
logits, with the memory full; a token is one step after 512 tokens of prompt, with a static cache. On a GPU it is
replays of a captured graph. `impl` is `memtrans`, or `transformers` without a memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import DEVICE, MEMORIES, TOY, measure

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from memtrans.hf import ModelMemory, add_memory

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SHAPE = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}  # fmt: skip
SMALL = {"vocab_size": 64, "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 256}  # fmt: skip
SEGMENT = 32 if TOY else 512
GPU_CASES = ("read-off-b4", "read-64k-b4", "read-64k", "token-off", "token-64k")
CASES = GPU_CASES if DEVICE == "cuda" or TOY else ("token-off", "token-64k")


def model_of(memory: str, documents: int) -> tuple[LlamaForCausalLM, ModelMemory | None]:
    """The model, with a memory that is full of random entries unless it is "off"."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(SMALL if TOY else SHAPE))).to(DEVICE, DTYPE).eval()
    if memory == "off":
        return model, None
    capacity = 64 if TOY else MEMORIES[memory]
    added = add_memory(model, max_memories=capacity, segment=SEGMENT, k=8 if TOY else 32)
    added.reset(documents)
    assert added._entries is not None
    for held in added._entries.memories.values():
        snapshot = held.snapshot()
        for _ in range(capacity // SEGMENT + 1):
            new = torch.randn(documents, held.kv_heads, SEGMENT, held.dim, device=DEVICE, dtype=DTYPE)
            snapshot = snapshot.append(new, torch.randn_like(new))
    return model, added


def reading(model: LlamaForCausalLM, memory: ModelMemory | None, documents: int) -> Callable[[], Any]:
    """One segment of each document; without a memory the same pass."""
    ids = torch.randint(SHAPE["vocab_size"] if not TOY else 64, (documents, SEGMENT), device=DEVICE)
    decoder = model.model

    def read() -> None:
        if memory is None:
            decoder(input_ids=ids, use_cache=False)
        else:
            with memory.writing():
                decoder(input_ids=ids, use_cache=False)

    return read


def writing(model: Any, prompt: int = SEGMENT) -> Callable[[], Any]:
    """One token behind a prompt of so many, at one place of a static cache."""
    cache = StaticCache(config=model.config, max_cache_len=2 * prompt)
    model(torch.randint(model.config.vocab_size, (1, prompt), device=DEVICE), past_key_values=cache, use_cache=True)
    ids, position = torch.ones(1, 1, dtype=torch.int64, device=DEVICE), torch.full((1, 1), prompt, device=DEVICE)
    mask = (torch.arange(2 * prompt, device=DEVICE) <= prompt)[None, None, None]

    def write() -> None:
        model.model(input_ids=ids, position_ids=position, attention_mask=mask, past_key_values=cache, use_cache=True)
        for layer in cache.layers:  # the next call writes into the same place
            layer.cumulative_length.fill_(prompt)

    return write


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_hf(benchmark: Any, name: str) -> None:
    what, size, *batch = name.split("-")
    documents = int(batch[0][1:]) if batch else 1
    model, memory = model_of(size, documents)
    call = reading(model, memory, documents) if what == "read" else writing(model)
    impl = "transformers" if memory is None else "memtrans"
    tokens = documents * (SEGMENT if what == "read" else 1)
    # the host needs longer for a pass than the GPU
    measure(benchmark, call, op="hf", impl=impl, case=name, dtype=DTYPE, graph_below=math.inf, tokens=tokens)
