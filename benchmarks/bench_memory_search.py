"""`KNNMemory.search`: the keys and values of each query's nearest entries, with upstream's interface, for attention of
one's own. The memory is full and has wrapped round.

`upstream` is the arithmetic of memorizing-transformers-pytorch 0.4.1 on the device of the tensors, as in upstream.py:
a matrix product and `topk` stand for its approximate index; then, as its `search` does, a document at a time is copied
out of a database of pairs, all are stacked, and what was not found is filled with zeros. `parts` is what cannot be
less: our search for the neighbours alone, and a fresh copy of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from common import DEVICE, MEMORIES, TOY, measure, peak_bytes
from torch import Tensor

from memtrans import KNNMemory

DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32


@dataclass(frozen=True)
class Problem:
    """Sizes in the letters of `memtrans_kernels`; `queries` is what stands between B and D."""

    width: int
    batch: int
    queries: tuple[int, ...]
    capacity: int = MEMORIES["8k"]
    neighbours: int = 32


PROBLEMS = {
    "d768-8k": Problem(768, 2, (512,)),
    "d128-8k": Problem(128, 2, (16, 256)),
    "d32-8k": Problem(32, 16, (512,)),
}
TOYS = {name: Problem(8, p.batch, (len(p.queries), 3), 16, 4) for name, p in PROBLEMS.items()}


def problem(name: str) -> tuple[Problem, KNNMemory, Tensor]:
    """Sizes, a full memory, and queries of unit length (B, ..., D)."""
    sizes = (TOYS if TOY else PROBLEMS)[name]
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE)

    memory = KNNMemory(sizes.width, sizes.capacity, sizes.batch, device=DEVICE, dtype=DTYPE)
    for _ in range(6):
        pairs = random(sizes.batch, sizes.capacity // 4, 2, sizes.width)
        memory.add(pairs / pairs.norm(dim=-1, keepdim=True))
    query = random(sizes.batch, *sizes.queries, sizes.width)
    return sizes, memory, (query / query.norm(dim=-1, keepdim=True)).to(DTYPE)


def ours(sizes: Problem, memory: KNNMemory, query: Tensor) -> Callable[[], Any]:
    return lambda: memory.search(query, sizes.neighbours)


def upstream(sizes: Problem, memory: KNNMemory, query: Tensor) -> Callable[[], Any]:
    entries = memory.entries()
    keys, database = entries.keys, torch.stack((entries.keys, entries.values), dim=-2)  # (B, M, D), (B, M, 2, D)

    def search() -> tuple[Tensor, Tensor]:
        masks, found = [], []
        for of_document, of_keys, pairs in zip(query, keys, database, strict=True):
            slots = (of_document @ of_keys.T).topk(sizes.neighbours).indices  # (..., K)
            masks.append(slots != -1)
            found.append(pairs[torch.where(masks[-1], slots, 0)])
        mask = torch.stack(masks)
        return torch.stack(found).masked_fill(~mask[..., None, None], 0.0), mask

    return search


def parts(sizes: Problem, memory: KNNMemory, query: Tensor) -> Callable[[], Any]:
    result, _ = memory.search(query, sizes.neighbours)
    flat = query.reshape(sizes.batch, 1, -1, sizes.width)
    return lambda: (memory.snapshot().nearest(flat, sizes.neighbours), result.clone())


@pytest.mark.parametrize(
    ("impl", "function"),
    [("memtrans", ours), pytest.param("upstream", upstream, marks=pytest.mark.rival), ("parts", parts)],
)
@pytest.mark.parametrize("name", PROBLEMS)
def test_memory_search(benchmark: Any, name: str, impl: str, function: Callable[..., Callable[[], Any]]) -> None:
    sizes, memory, query = problem(name)
    run = function(sizes, memory, query)
    result = 2 * query.numel() * sizes.neighbours * DTYPE.itemsize
    measure(
        benchmark, run, op="memory_search", impl=impl, case=name, dtype=DTYPE, capturable=not TOY,
        bytes=2 * result, result_bytes=result, peak_bytes=peak_bytes(run, 0),
    )  # fmt: skip
