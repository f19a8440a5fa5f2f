"""Exact top-K search against its rivals, all in one run, over memories that are full and have wrapped.

`sdpa-dense` is the rival that matters: plain attention to the whole memory, which finds no neighbours but needs none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import DEVICE, TOY, Case, Ring, case, full_ring, measure
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from memtrans_kernels import backends_info, knn_search

DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32
GPU_CASES = ("d64-8k", "d64-64k", "d64-262k", "d128-8k", "d128-64k", "paper-64k", "decode-d64-64k", "decode-paper-64k")
CASES = GPU_CASES if DEVICE == "cuda" else ("cpu-d64-64k",)
MOST_SCORE_BYTES = 2**31  # of one row in float16: beyond it a matrix of all scores is no rival


def ours(sizes: Case, ring: Ring, query: Tensor) -> Callable[[], Any]:
    arguments = (query, ring.keys, ring.rows, ring.start, ring.cursor, sizes.capacity, sizes.neighbours)
    return lambda: knn_search(*arguments)


def faiss_bridge(sizes: Case, ring: Ring, query: Tensor) -> Callable[[], Any]:
    """In bfloat16: of the three dtypes that it takes, the one it is fastest in."""
    keys = ring.keys.bfloat16()
    arguments = (query.bfloat16(), keys, ring.rows, ring.start, ring.cursor, sizes.capacity, sizes.neighbours)
    return lambda: knn_search(*arguments, backend="faiss")


def flashlib(sizes: Case, ring: Ring, query: Tensor) -> Callable[[], Any]:
    flash_knn = pytest.importorskip("flashlib").flash_knn
    queries, keys = (tensor.bfloat16().contiguous() for tensor in by_row(sizes, ring, query))
    return lambda: flash_knn(queries, keys, sizes.neighbours)


def product_and_topk(sizes: Case, ring: Ring, query: Tensor) -> Callable[[], Any]:
    queries, keys = by_row(sizes, ring, query)
    return lambda: [(q @ k.T).topk(sizes.neighbours) for q, k in zip(queries, keys, strict=True)]


def dense_attention(sizes: Case, ring: Ring, query: Tensor) -> Callable[[], Any]:
    queries, keys = (tensor[:, None] for tensor in by_row(sizes, ring, query))
    return lambda: scaled_dot_product_attention(queries, keys, keys)


def faiss_on_the_cpu(sizes: Case, ring: Ring, query: Tensor) -> Callable[[], Any]:
    """`IndexFlatIP`, a row at a time; the indices are filled beforehand, which is in its favour."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    queries, keys = by_row(sizes, ring, query)
    indices = []
    for row in keys:
        indices.append(faiss.IndexFlatIP(sizes.width))
        indices[-1].add(row.numpy())
    return lambda: [i.search(q.numpy(), sizes.neighbours) for i, q in zip(indices, queries, strict=True)]


def by_row(sizes: Case, ring: Ring, query: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (R, H/G · N, D) and as many keys (R, M, D) as are visible."""
    return query.reshape(sizes.rows, -1, sizes.width), ring.keys[:, : sizes.capacity]


RIVALS = {
    "memtrans": ours,
    "faiss-gpu": faiss_bridge,
    "faiss-cpu": faiss_on_the_cpu,
    "flashlib": flashlib,
    "torch": product_and_topk,
    "sdpa-dense": dense_attention,
}


def runs_here(impl: str, sizes: Case) -> bool:
    """Whether an implementation belongs to this machine and this case."""
    if impl == "faiss-gpu":
        return any(line.live for line in backends_info() if (line.backend, line.device) == ("faiss", "cuda"))
    if impl in ("flashlib", "faiss-cpu"):
        return (impl == "flashlib") == (DEVICE == "cuda")
    score_bytes = sizes.capacity * sizes.length * sizes.heads // sizes.groups * 2
    return impl != "torch" or score_bytes <= MOST_SCORE_BYTES


@pytest.mark.parametrize(
    ("name", "impl"), [(name, impl) for name in CASES for impl in RIVALS if runs_here(impl, case(name))]
)
def test_knn_search(benchmark: Any, name: str, impl: str) -> None:
    sizes = case(name)
    ring = full_ring(sizes, DTYPE, DEVICE)
    query = normalize(torch.randn(sizes.batch, sizes.heads, sizes.length, sizes.width, device=DEVICE), dim=-1).to(DTYPE)
    flop = 2 * query.numel() * sizes.capacity
    key_bytes = sizes.rows * sizes.capacity * sizes.width * DTYPE.itemsize
    measure(
        benchmark,
        RIVALS[impl](sizes, ring, query),
        op="knn_search",
        impl=impl,
        case=name,
        dtype=DTYPE,
        capturable=impl != "faiss-gpu" and not TOY,
        flop=flop,
        bytes=key_bytes,
    )
