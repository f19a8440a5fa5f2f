"""Exact top-K search against its rivals, all in one run, over memories that are full and have wrapped.

Keys and queries are random; those of `trained-*` are what a small model made of text, whose neighbours cluster in time,
those of `hard-<kind>-*` are of hard_rings.py.
`sdpa-dense` is the rival that matters: plain attention to the whole memory, which finds no neighbours but needs none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from bench_train import text
from common import DEVICE, TOY, Case, Ring, case, full_ring, measure, peak_bytes
from hard_rings import KINDS, hard_problem
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from memtrans import KNNAttention
from memtrans.training.settings import Settings
from memtrans.training.trainer import Trainer
from memtrans_kernels import backends_info, knn_search

DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32
GPU_CASES = (
    "d64-8k", "d64-64k", "d64-262k", "d128-8k", "d128-64k", "paper-64k", "decode-d64-64k", "decode-paper-64k",
    "trained-d64-64k",
)  # fmt: skip
HARD_SHAPES = ("d64-8k", "d64-64k", "d128-64k", "paper-64k", "decode-d64-64k")
HARD_CASES = (
    *(f"hard-{kind}-{shape}" for kind in KINDS for shape in HARD_SHAPES),
    *(f"hard-mixed-{percent}-d64-64k" for percent in (1, 50)),
)
TRAINING_STEPS = 500
CASES = GPU_CASES if DEVICE == "cuda" else ("cpu-d64-64k",)
MOST_SCORE_BYTES = 2**31  # of one row in float16: beyond it a matrix of all scores is no rival


def ours(sizes: Case, ring: Ring, query: Tensor) -> Callable[[], Any]:
    arguments = (query, ring.keys, ring.rows, ring.start, ring.cursor, sizes.capacity, sizes.neighbours)
    return lambda: knn_search(*arguments)


def ours_in_triton(sizes: Case, ring: Ring, query: Tensor) -> Callable[[], Any]:
    """What every GPU but a Hopper runs, and a Hopper without the compiled module."""
    arguments = (query, ring.keys, ring.rows, ring.start, ring.cursor, sizes.capacity, sizes.neighbours)
    return lambda: knn_search(*arguments, backend="triton")


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


@functools.cache
def trained() -> tuple[Ring, Tensor]:
    """The memory of a model after TRAINING_STEPS segments of the standard library's sources, and its next queries."""
    sizes = case("d64-64k")
    settings = Settings(
        steps=TRAINING_STEPS, batch=sizes.batch, segment=sizes.length, layers=4, width=512, heads=sizes.heads,
        head_width=sizes.width, memory=sizes.capacity, memory_offset=-4.0, dtype="bfloat16",
    )  # fmt: skip
    trainer = Trainer(settings, text(sizes.batch), torch.device(DEVICE))
    for _ in range(TRAINING_STEPS):
        trainer.advance()
    snapshot = trainer.reader.memories[0].snapshot()
    layer = next(module for module in trainer.model.modules() if isinstance(module, KNNAttention))
    found: list[Tensor] = []
    layer.register_forward_pre_hook(lambda module, given: found.append(normalize(module.project(given[0])[0], dim=-1)))
    tokens = trainer.loader.take()[0].tokens[0, 0]
    with torch.no_grad():
        trainer.model(tokens, trainer.reader.memories, add_knn_memory=False)
    keys, values = snapshot.keys.clone(), snapshot.values.clone()
    return Ring(keys, values, snapshot.cursor, snapshot.start, snapshot.rows), found[0].to(DTYPE)


def split_hard(name: str) -> tuple[str, str]:
    """The kind and the shape of `hard-<kind>-<shape>`.

    >>> split_hard("hard-mixed-50-decode-d64-64k")
    ('mixed-50', 'decode-d64-64k')
    """
    words = name.removeprefix("hard-").split("-")
    kind_words = 2 if words[0] == "mixed" else 1
    return "-".join(words[:kind_words]), "-".join(words[kind_words:])


def problem(name: str) -> tuple[Case, Ring, Tensor]:
    """Sizes, a full ring, and queries of unit length (B, H, N, D)."""
    if name.startswith("trained-"):
        return case(name.removeprefix("trained-")), *trained()
    if name.startswith("hard-"):
        kind, shape = split_hard(name)
        return case(shape), *hard_problem(kind, case(shape), DTYPE)
    sizes = case(name)
    query = torch.randn(sizes.batch, sizes.heads, sizes.length, sizes.width, device=DEVICE)
    return sizes, full_ring(sizes, DTYPE, DEVICE), normalize(query, dim=-1).to(DTYPE)


def by_row(sizes: Case, ring: Ring, query: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (R, H/G · N, D) and as many keys (R, M, D) as are visible."""
    return query.reshape(sizes.rows, -1, sizes.width), ring.keys[:, : sizes.capacity]


RIVALS = {
    "memtrans": ours,
    "memtrans-triton": ours_in_triton,
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
    if impl in ("memtrans-triton", "flashlib", "faiss-cpu"):
        return (impl != "faiss-cpu") == (DEVICE == "cuda")
    score_bytes = sizes.capacity * sizes.length * sizes.heads // sizes.groups * 2
    return impl != "torch" or score_bytes <= MOST_SCORE_BYTES


@pytest.mark.parametrize(
    ("name", "impl"),
    [(name, impl) for name in CASES for impl in RIVALS if runs_here(impl, case(name.removeprefix("trained-")))],
)
def test_knn_search(benchmark: Any, name: str, impl: str) -> None:
    sizes, ring, query = problem(name)
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


@pytest.mark.rival
@pytest.mark.skipif(DEVICE == "cpu", reason="on a CPU every case is in float32")
def test_knn_search_of_float32_keys(benchmark: Any) -> None:
    sizes, ring, query = problem("d64-64k")
    wide = replace(ring, keys=ring.keys.float())
    measure(
        benchmark,
        ours_in_triton(sizes, wide, query),
        op="knn_search",
        impl="memtrans-triton",
        case="d64-64k",
        dtype=torch.float32,
        capturable=not TOY,
        flop=2 * query.numel() * sizes.capacity,
    )


@pytest.mark.parametrize("name", HARD_CASES if DEVICE == "cuda" or TOY else ())
def test_hard_keys(benchmark: Any, name: str) -> None:
    """Beside the entries of dense attention, whose time does not depend on the keys."""
    sizes, ring, query = problem(name)
    run = ours(sizes, ring, query)
    results = 8 * query[..., 0].numel() * sizes.neighbours
    measure(
        benchmark,
        run,
        op="knn_search",
        impl="memtrans",
        case=name,
        dtype=DTYPE,
        capturable=not TOY,
        workspace_bytes=max(0, peak_bytes(run, 0) - results),
    )


@pytest.mark.parametrize("ceiling", ["matrix-product", "copy"])
def test_ceilings(benchmark: Any, ceiling: str) -> None:
    """What the machine does at best: square matrices multiplied (8192 rows on a GPU, 1024 on a CPU), and copied."""
    size = 64 if TOY else 8192 if DEVICE == "cuda" else 1024
    left, right = torch.randn(2, size, size, device=DEVICE).to(DTYPE)
    source = torch.randn(4 * size * size, device=DEVICE).to(DTYPE)
    target = torch.empty_like(source)
    run, rate = {
        "matrix-product": (lambda: left @ right, {"flop": 2 * size**3}),
        "copy": (lambda: target.copy_(source), {"bytes": 2 * source.nbytes}),
    }[ceiling]
    measure(benchmark, run, op="ceilings", impl="torch", case=ceiling, dtype=DTYPE, **rate)
