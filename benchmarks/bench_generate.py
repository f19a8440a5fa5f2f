"""Generation token by token: the whole step, sampling and ends of segments included, with and without a full memory.

A case is `<demo|enwik8>-<off|8k|64k|262k>[-b16|-greedy]`: a preset's model with random weights, its memory and XL
caches full and wrapped. `-b16` continues sixteen documents, which stand at different places of their segments;
`-greedy` takes the likeliest token, where others draw one. A call generates one segment for each document; `ms` is the
time of one step.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from common import DEVICE, MEMORIES, TOY, busy_share, measure
from torch import Tensor
from torch.nn.functional import normalize

from memtrans.generation.decoder import Decoder
from memtrans.generation.generate import stream
from memtrans.generation.sampling import Sampling
from memtrans.presets import PRESETS
from memtrans.training.model import build_model

GPU_CASES = (
    "demo-off", "demo-64k", "demo-off-greedy", "demo-64k-greedy",
    "enwik8-off-b1", "enwik8-64k-b1", "enwik8-off-b16", "enwik8-64k-b16",
)  # fmt: skip
CASES = GPU_CASES if DEVICE == "cuda" else ("demo-off", "demo-64k")
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
ENTRIES_AT_ONCE = 8192
MOST_TOKENS = 10**5  # of a stream that is never read to its end


def continued(name: str) -> Decoder:
    """A decoder of the case, past its prompts."""
    preset, memory, *others = name.split("-")
    documents = 16 if "b16" in others else 1
    capacity = 0 if memory == "off" else 32 if TOY else MEMORIES[memory]
    settings = dataclasses.replace(PRESETS[preset], memory=capacity, **({"segment": 8} if TOY else {}))
    torch.manual_seed(0)
    model = build_model(settings).to(DEVICE, DTYPE).eval()
    memories = model.create_knn_memories(batch_size=documents, device=DEVICE, spare=settings.segment)
    for held in memories:
        left = 3 * capacity // 2
        while left > 0:
            entries = torch.randn(documents, min(left, ENTRIES_AT_ONCE), 2, settings.head_width, device=DEVICE)
            held.add(normalize(entries, dim=-1))
            left -= ENTRIES_AT_ONCE
    decoder = Decoder(model, documents, segment=settings.segment, memories=memories)
    lengths = (2 * settings.segment + row * settings.segment // documents for row in range(documents))
    decoder.read([torch.randint(256, (length,)) for length in lengths])
    return decoder


def consume(tokens: Iterator[Tensor], count: int) -> None:
    for _ in itertools.islice(tokens, count):
        pass


@pytest.mark.parametrize("name", CASES)
def test_generate(benchmark: Any, name: str) -> None:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    decoder = continued(name)
    tokens = stream(decoder, MOST_TOKENS, Sampling(temperature=0.0 if name.endswith("greedy") else 1.0))

    def segment() -> None:
        consume(tokens, decoder.segment)

    segment()
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None
    busy = busy_share(lambda: consume(tokens, 64))
    measure(
        benchmark, segment, op="generate", impl="memtrans", case=name, dtype=DTYPE, capturable=False,
        calls=decoder.segment, tokens=decoder.batch, gpu_busy=busy, peak_bytes=peak,
    )  # fmt: skip
