"""`KNNMemory.search`: the keys and values of each query's nearest entries, with upstream's interface, for attention of
one's own. The memory is full and has wrapped round.

`upstream` is the arithmetic of memorizing-transformers-pytorch 0.4.1 on the device of the tensors, as in upstream.py:
a matrix product and `topk` stand for its approximate index; then, as its `search` does, a document at a time is copied
out of a database of pairs, all are stacked, and what was not found is filled with zeros. `parts` is what cannot be
less: our search for the neighbours alone, and a fresh copy of the result.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from common import DEVICE, MEMORIES, TOY, dtype_name, environment, gpu_milliseconds, peak_bytes, write_down
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


IMPLEMENTATIONS = {"memtrans": ours, "upstream": upstream, "parts": parts}


@pytest.mark.parametrize("name", PROBLEMS)
def test_memory_search(benchmark: Any, name: str) -> None:
    """All in rounds that alternate, because on a CPU others may be at work; medians, and the load meanwhile."""
    sizes, memory, query = problem(name)
    runs = {impl: make(sizes, memory, query) for impl, make in IMPLEMENTATIONS.items()}
    seconds: dict[str, list[float]] = {impl: [] for impl in runs}

    def round_of_all() -> None:
        for impl, run in runs.items():
            begin = time.perf_counter()
            result = run()
            seconds[impl].append(time.perf_counter() - begin)
            del result

    if DEVICE == "cpu":
        benchmark.pedantic(round_of_all, rounds=2 if TOY else 15, warmup_rounds=1)
        times = {impl: statistics.median(of_impl[1:]) * 1e3 for impl, of_impl in seconds.items()}
        more = {impl: {"load": [round(load, 1) for load in os.getloadavg()]} for impl in runs}
    else:
        times = {impl: gpu_milliseconds(run)[0] for impl, run in runs.items()}
        more = {impl: {"peak_bytes": peak_bytes(run, 0)} for impl, run in runs.items()}
        benchmark.pedantic(lambda: (round_of_all(), torch.cuda.synchronize()), rounds=5)
    result = 2 * query.numel() * sizes.neighbours * DTYPE.itemsize
    for impl, milliseconds in times.items():
        labels = {"op": "memory_search", "impl": impl, "case": name, "mode": "forward", "dtype": dtype_name(DTYPE)}
        rates = {"result_bytes": result, "bytes_per_second": 2 * result / milliseconds * 1e3, "ms": milliseconds}
        write_down({**labels, **environment(), **more[impl], **rates})
